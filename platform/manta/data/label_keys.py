"""The keys of a dataset of labelled texts."""

from typing import Any, Literal

from manta.config import Fraction, config

VAL_FRACTION, TEST_FRACTION = 0.1, 0.2
MOST_APART = 0.5  # share of the texts that are not trained on


@config
class LabelKeys:
    labels: tuple[str, ...] | Literal["auto"] = "auto"
    """Labels to learn (kind=classify), in the order of the classifier's outputs. auto: those in the
    source, sorted; with a list, a row with another label is a bad row (`on_bad_rows`)."""
    label_key: str = "label"
    """Column or key with the label of a text (kind=classify): a text or a whole number."""
    quotes: Literal["auto", "none", "double"] = "auto"
    """What double quotes are in a table (kind=classify). double: they hold a field together, as CSV
    has it; none: characters of the text; auto: double in .csv, none in .tsv."""
    test_fraction: Fraction = TEST_FRACTION
    """Share of the labelled texts (kind=classify) that are kept apart for a test at the end, of
    each label alike; nothing is trained or chosen on them."""
    balance: bool = False
    """Whether texts of the more frequent labels (kind=classify) are left out, drawn by
    `shuffle_seed`, until each label has as many as the rarest."""

    def label_problems(
        self, val_source: str | None, val_fraction: float, deduplicate: str, text_key: str
    ) -> list[str]:
        """Messages about what these keys, and those of the dataset given here, cannot be."""
        found = []
        if val_source is not None:
            found.append(
                "val_source is not for kind=classify, whose source is split by val_fraction and "
                "test_fraction: omit it, and give another file to jobs/classify.py later"
            )
        if deduplicate == "near":
            found.append("deduplicate=near is not for kind=classify: use exact or none")
        if val_fraction + self.test_fraction > MOST_APART:
            found.append(
                f"val_fraction={val_fraction} and test_fraction={self.test_fraction} leave less "
                "than half to train on: lower them"
            )
        if self.labels != "auto" and len(set(self.labels)) < max(2, len(self.labels)):
            found.append(f"labels={list(self.labels)}: at least two are needed, all different")
        if self.label_key == text_key:
            found.append(f"label_key={self.label_key}: it is text_key too")
        return found

    def label_recipe(self) -> dict[str, Any]:
        """The settings that decide which texts are in which split, with which ids."""
        labels = self.labels if self.labels == "auto" else list(self.labels)
        return {"labels": labels, "test_fraction": self.test_fraction, "balance": self.balance}
