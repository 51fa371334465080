"""What people read of runs: the report, the comparison and the tables, as Markdown and as pages."""
