def pytest_terminal_summary(terminalreporter):
    """The count of inputs by reader."""
    from collections import Counter

    counts = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name.startswith("fuzz "):
                counts[name[5:]] += value
    if counts:
        terminalreporter.section("mutated inputs by reader")
        for name in sorted(key for key in counts if not key.endswith(" read")):
            terminalreporter.write_line(
                f"{name:<28}{counts[name]:>8,}   read all the same: {counts[name + ' read']:>6,}"
            )
        terminalreporter.write_line(f"{'total':<28}{sum(v for k, v in counts.items() if not k.endswith(' read')):>8,}")
