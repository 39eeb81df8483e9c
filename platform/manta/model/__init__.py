"""The model: a GPT in one file of plain PyTorch, its presets, generation, and its cost."""
