"""Prints the expected values of the tests of src/compare/ssim.rs.

Implements the paper (Wang et al. 2004) independently of the Rust code: one weighted mean with the whole
11x11 window for every position, variances and covariance around the means. Needs any version of numpy:

    python tests/reference/ssim_values.py
"""

import numpy as np


def ssim(a: np.ndarray, b: np.ndarray, value_range: float) -> float:
    """Mean structural similarity of the luma of two [height, width, 3] images."""
    x, y = a @ [0.299, 0.587, 0.114], b @ [0.299, 0.587, 0.114]
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_image(height: int, width: int, change: int) -> np.ndarray:
    """A test image of integers from 0 to 255, computed without floating point and so equal in Rust."""
    y, x, c = np.indices((height, width, 3))
    ramp = (y * 5 + x * 3 + c * 40) % 200
    return (ramp + (x * 31 + y * 17 + c * 7) * change % 23).astype(float)


for height, width in ((11, 11), (16, 29), (40, 24)):
    a, b, c = (test_image(height, width, change) for change in (0, 1, 5))
    print(height, width, f"{ssim(a, b, 255):.15f}", f"{ssim(b, c, 255):.15f}")
print(f"{ssim(test_image(16, 29, 0) / 255, 1 - test_image(16, 29, 0) / 255, 1):.15f}")
