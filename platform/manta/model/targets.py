"""The mark of a target that no loss counts. Nothing imports torch here: data works without it."""

IGNORED = -1  # also stands for a token that could not be read
