"""What training would read: every row checked, measured and compared, as text, JSON and a page."""
