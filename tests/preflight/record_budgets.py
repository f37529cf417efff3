"""Measures cases of `budget_cases` (all, or those named) with the installed libtpu and writes `budgets.json`."""

import json
import sys

from budget_cases import BUDGETS, CASES, libtpu_version, read_budgets, request_of

from lark_jax.preflight.requests import compile_in_child


def main() -> None:
    version = libtpu_version()
    if version is None:
        raise SystemExit("error: libtpu is not installed: pip install -e '.[preflight]'")
    budgets = read_budgets() if BUDGETS.is_file() else {}
    of_version = budgets.setdefault(version, {})
    for case in sys.argv[1:] or CASES:
        memory = compile_in_child(request_of(case)).memory
        of_version[case] = {"arguments": memory.arguments, "temporary": memory.temporary}
        print(f"{case}: {memory.arguments:,} + {memory.temporary:,} bytes")
    budgets[version] = {case: of_version[case] for case in CASES if case in of_version}
    BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
