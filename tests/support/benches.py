"""What stands in for a GPU where benchmarks are tested."""

from mtpkern.bench.timing import Peak

H200 = Peak(4e12, 800e12, "made up")


def goals(tables):
    return {goal.what: (goal.measured, goal.met) for table in tables for goal in table.goals}
