"""What the pages and figures of all tasks share."""
