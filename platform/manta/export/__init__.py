"""Export and import: models in the formats that others read and write."""
