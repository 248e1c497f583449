"""Published IsoFLOP points (MDM-Prime-v2, released plot/plot_isoflop_curves.py): sizes in millions, training loss.

ARM and MDM are an exact NLL and a valid bound. The third family of that file plots the joint loss, retracted as a
likelihood: of it only what power laws need is kept here, under a name that says so.
"""

import numpy as np

from llm.scaling.isoflop import Points

ARM = """
3e18: 25 3.547, 49 3.458, 79 3.413, 106 3.380, 154 3.416, 201 3.421, 252 3.443, 315 3.467, 354 3.488, 413 3.518, 571 3.594
6e18: 49 3.332, 79 3.284, 106 3.257, 154 3.252, 201 3.264, 252 3.265, 315 3.274, 354 3.282, 413 3.292, 571 3.364, 771 3.430
1e19: 79 3.238, 106 3.177, 154 3.162, 201 3.162, 252 3.152, 315 3.170, 354 3.173, 413 3.175, 571 3.228, 771 3.255, 1107 3.355
3e19: 106 3.087, 201 3.020, 252 2.997, 315 2.992, 413 2.963, 571 2.979, 771 2.987, 1107 3.061, 1529 3.13
6e19: 201 2.954, 315 2.930, 413 2.906, 571 2.891, 771 2.894, 1107 2.912, 1529 2.959, 2359 3.025
1e20: 315 2.859, 413 2.821, 571 2.795, 771 2.772, 1107 2.790, 1529 2.835, 2359 2.891, 3416 2.927
3e20: 413 2.734, 571 2.676, 771 2.649, 1107 2.619, 1529 2.634, 2359 2.669, 3416 2.720
"""  # noqa: E501
MDM = """
3e18: 14 4.144, 25 4.009, 36 3.993, 49 3.971, 64 3.964, 79 3.961, 106 3.997, 154 4.060, 201 4.120, 252 4.197
6e18: 25 3.899, 36 3.846, 49 3.829, 64 3.780, 79 3.789, 106 3.805, 154 3.838, 201 3.889, 252 3.907, 354 4.026, 413 4.064
1e19: 36 3.770, 64 3.697, 79 3.691, 106 3.677, 154 3.686, 201 3.719, 252 3.766, 354 3.842, 413 3.891, 571 3.939
3e19: 79 3.514, 106 3.481, 154 3.478, 201 3.451, 252 3.468, 354 3.488, 413 3.498, 571 3.588, 771 3.664, 1107 3.758
6e19: 106 3.424, 201 3.408, 252 3.382, 354 3.398, 413 3.405, 571 3.443, 771 3.480, 1107 3.536, 1529 3.656
1e20: 201 3.335, 252 3.299, 354 3.297, 413 3.289, 571 3.294, 771 3.327, 1107 3.351, 1529 3.409, 2359 3.473
3e20: 252 3.144, 354 3.110, 413 3.095, 571 3.085, 771 3.081, 1107 3.098, 1529 3.106, 2359 3.150, 3416 3.212
"""
BUDGETS = np.array([3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20])
JOINT_NO_LIKELIHOOD_SIZES = 1e6 * np.array([46.9, 59.8, 84.7, 161.7, 216.0, 363.0, 497.6])
JOINT_NO_LIKELIHOOD_MINIMA = np.array([2.8227, 2.7020, 2.5881, 2.4107, 2.3264, 2.2316, 2.0852])


def published(family: str) -> Points:
    rows = []
    for line in {"arm": ARM, "mdm": MDM}[family].strip().splitlines():
        budget, pairs = line.split(":")
        for pair in pairs.split(","):
            size, loss = pair.split()
            rows.append((float(budget), 1e6 * float(size), float(loss)))
    budgets, parameters, loss = np.array(rows).T
    return Points(
        estimate={"arm": "nll_ar", "mdm": "nelbo_token"}[family],
        budgets=budgets,
        parameters=parameters,
        tokens=budgets / (6 * parameters),
        flops=budgets,
        loss=loss,
        standard_error=np.full_like(loss, 0.002),
    )
