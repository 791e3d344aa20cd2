"""The check of a job's nodes before it trains: memory, speed, links and folders, and which nodes to leave out."""
