"""Charts and the page of a report, from the files of a run. No torch."""
