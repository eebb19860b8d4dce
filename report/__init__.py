"""Results to a table and plots: the JSON of each run in, RESULTS.md, results.csv, top1.png and curves.png out."""

from report.table import write as write
