"""What stands in for a GPU where benchmarks are tested."""

from mtpkern.bench.timing import Peak

H200 = Peak(4e12, 800e12, "made up")


def last(tables):
    """Of tables that come again with more rows, under the same caption, what the last ones say."""
    return list({table.caption: table for table in tables}.values())


def goals(tables):
    return {goal.what: (goal.measured, goal.met) for table in tables for goal in table.goals}
