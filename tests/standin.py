"A crude neck for tests: nine blocks of bone with a canal and a spinous process, discs between them, a skull, soft tissue, noise."
import numpy as np


def crude_neck(seed=0, n=48, px=64, mm=(2.2, 2.2, 3.2)):
    "HU (n, px, px) int16 with the lowest slice first, labels 1 to 9 of the same shape, spacing (row, column, slice) in mm."
    rng = np.random.default_rng(seed); z, y, x = np.meshgrid(np.arange(n)*mm[2], np.arange(px)*mm[0], np.arange(px)*mm[1], indexing="ij")
    size, bend, top = rng.uniform(.9, 1.1), rng.uniform(2, 12), n*mm[2] - rng.uniform(16, 26)
    y = y - px*mm[0]/2 + bend*np.sin(z/z.max()*np.pi) - rng.uniform(-6, 6); x = x - px*mm[1]/2 - rng.uniform(-6, 6)
    hu = np.where((y/56)**2 + (x/50)**2 < 1, 50., -1000.); mask = np.zeros(hu.shape, np.uint8)
    hu[(z > top + 4) & (np.abs(np.hypot(y, x) - 40) < 5)] = 900; hu[(z > top + 4) & (np.hypot(y, x) < 36)] = 35
    for k in range(1, 10):
        high = 15*size*(.8 if k == 1 else 1.2 if k == 2 else 1.); slab = (z < top - 1.5) & (z > top - high + 1.5); w = (8 + .5*k)*size
        ring = np.abs(np.hypot(y - 6, x*.8) - 15*size) < 4
        bone = slab & (ring if k == 1 else (np.hypot(y, x*.8) < w) | ((np.abs(x) < 3.5) & (y > w + 10) & (y < w + 22 + k)) | (np.abs(np.hypot(y - w - 5, x) - 9) < 3))
        if k == 2: bone |= (np.hypot(y, x) < 5) & (z < top + 8) & (z > top - 5)
        mask[bone & (mask == 0)] = k; top -= high
    hu[mask > 0] = 400
    return np.clip(np.rint(hu + rng.normal(0, 40, hu.shape)), -1024, 3071).astype(np.int16), mask, mm
