"""What a run writes down: metrics, and where its time went."""
