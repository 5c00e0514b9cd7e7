"""What a choice costs: measurements that print a table, draw a plot and leave a JSON file."""
