"""The command line: the only place that parses flags and YAML and prints for people."""
