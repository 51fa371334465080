"""The files of benchmarks: tables in three formats, their cells, and what all benchmarks that read one share."""
