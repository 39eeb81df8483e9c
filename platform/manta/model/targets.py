"""Targets that no loss counts. (torch is not imported: data, which marks them, does without.)"""

IGNORED = -1  # also stands for a token that could not be read
