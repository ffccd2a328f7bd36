"""What the runs of a study say together: tables, figures, a page. Reads files only; no torch."""
