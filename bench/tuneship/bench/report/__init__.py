"""What a reader sees: one HTML file, and the history of past reports."""
