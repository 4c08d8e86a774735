"""What people use today for what emtool does, as short programs: the benchmarks run them beside emtool."""
