"""Robot logs and prepared rows: sources, statistics, video. Knows no model."""
