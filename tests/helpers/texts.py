"""Texts that a person may give as a prompt or a name, each of which something could take for more
than text: YAML, a shell, a terminal, an option."""

TEXTS = [
    # YAML's comments, mappings, lists, references and tags
    "x = 1  # set x", "# Title", "Q: What is 2+2? A:", "a: b", "{a: 1}", "{a: b}", "[a, b]", "[a]",
    "- x", "- a", "? a", "| a", "> a", "&a", "*a", "%", "@", "`", "!!int 3", "!!python/object:os.x",
    "---", "...", "a: [", "}",
    # numbers, times, words with a meaning
    "12:30:45", "007", "0x10", "0o17", "1e3", "-1_0.5E+3", ".5", "1_000", "-0", "2024-01-31",
    "2024-01-31T10:00:00Z", ".inf", ".nan", "true", "yes", "no", "on", "off", "y", "null", "null ",
    "Null", "~", "",
    # quotes, escapes, interpolation
    "'", '"', "'quoted'", '"quoted"', "it's", "\\n", "\\", "\\\\${a}\\", "${home}", "${x", "${",
    "\\${a}", "$HOME", "$(ls)", "???", "\\???", "a=b", "key=value", "--x=1", "-v",
    '{"zero_optimization": {"sub_group_size": 5000}}',
    # white space and lines
    " both ends ", "trailing  ", "\ttab\t", "a\nb\n", "\n", "a\r\nb", "def f(x):\n    return x\n",
    # other alphabets, marks, directions and controls
    "naïve 🐟", "👨‍👩‍👧", "e\u0301", "שלום", "\u202eabc", "日本語", "\x85", "\u2028", "\ufeff",
    "\x1b[2J", "\x07",
    # lengths
    "x" * 20_000, "word " * 3000,
]  # fmt: skip
