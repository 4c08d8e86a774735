"""The command line: parse, one call, render. The only place that knows typer and rich."""
