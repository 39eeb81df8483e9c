"""A text of simple habits, and rows of HellaSwag that ask about them."""

from typing import Any

HABITS = {
    "cat": ("sea", "caught a small silver fish"),
    "dog": ("hill", "dug"),
    "bird": ("town", "found some seeds by the old wall"),
    "ray": ("reef", "ate shrimps"),
}
TEXT = "\n".join(
    f"Going out: The {animal} number {i} went to the {place}. The {animal} {thing}."
    for i in range(60)
    for animal, (place, thing) in HABITS.items()
)
ENDINGS = [thing + "." for _, thing in HABITS.values()]


def hellaswag_rows() -> list[dict[str, Any]]:
    """Rows as in hellaswag_val.jsonl; every third one has a beginning longer than the context."""
    rows = []
    for i in range(16):
        animal, (place, _) = list(HABITS.items())[i % 4]
        long = " The bird went to the town [title] and back." * (8 if i % 3 == 0 else 0)
        rows.append(
            {
                "activity_label": "Going out",
                "ctx_a": f"The {animal} number {i} went to the {place}.{long}",
                "ctx_b": f"the {animal}",
                "endings": ENDINGS[i % 3 :] + ENDINGS[: i % 3],
                # A quarter of the labels is wrong, so that no score is 1.
                "label": (i % 4 - i % 3 + (i < 4)) % 4,
            }
        )
    return rows
