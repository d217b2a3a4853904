import copy, functools
from dataclasses import dataclass
import numpy as np, cv2
from types import SimpleNamespace as NS
from scipy import ndimage as ndi, fft

F = np.float32
def smoothstep(a, b, v):
    t = np.clip((v - a)/(b - a), 0, 1); return t*t*(3 - 2*t)
def inside(sd, width=1.2): return np.clip(.5 - sd/width, 0, 1)
def paint(hu, occ, value): hu += occ*(value - hu)

def ellipsoid(x, y, z, c, r):
    q = np.sqrt(((x-c[0])/r[0])**2 + ((y-c[1])/r[1])**2 + ((z-c[2])/r[2])**2)
    return (q - 1)*(r[0]*r[1]*r[2])**(1/3)

def capsule(x, y, z, p, q, rp, rq):
    p, q = np.asarray(p, F), np.asarray(q, F); v = q - p
    t = np.clip(((x-p[0])*v[0] + (y-p[1])*v[1] + (z-p[2])*v[2])/(v@v), 0, 1)
    return np.sqrt((x-p[0]-t*v[0])**2 + (y-p[1]-t*v[1])**2 + (z-p[2]-t*v[2])**2) - (rp + t*(rq-rp))

VOXEL = 1.5                                             # mm, of the noise volumes
@functools.lru_cache(1)
def noise_bank():
    "Periodic random volumes of 128 voxels a side: `low` (17 mm), `rough` (4.5 mm), `folds` (band-pass; its zeros make the sulci)."
    rng = np.random.default_rng(20190924)
    def volume(sigma, wide=None):
        v = rng.standard_normal((128,)*3, dtype=F); out = ndi.gaussian_filter(v, sigma, mode='wrap', truncate=3)
        if wide: out -= ndi.gaussian_filter(v, wide, mode='wrap', truncate=3)
        return (out - out.mean())/out.std()
    return NS(low=volume(10).ravel(), rough=volume(2.9).ravel(), folds=volume(1.9, 3.5))

class Noise:
    """A study's own random fields: the shared volumes seen from a random offset and with random axes.
    `at(x, y, z)` fixes the points (mm); `low(k)`, `rough(k)` then give independent fields there, `folds()` the cortex."""
    def __init__(self, rng):
        self.off = rng.integers(0, 128**3, 64); self.axes = rng.permutation(3); self.sign = rng.choice([-1, 1], 3).astype(F); self.shift = rng.uniform(0, 128, 3).astype(F)
    def _grid(self, x, y, z):
        p = (x, y, z); return [p[a]*(s/VOXEL) + o for a, s, o in zip(self.axes, self.sign, self.shift)]
    def at(self, x, y, z):
        i, j, k = (v.astype(np.int32) & 127 for v in self._grid(x, y, z))
        out = copy.copy(self); out.idx = (i << 14) + (j << 7) + k; return out
    def low(self, k=0): return noise_bank().low[(self.idx + int(self.off[k])) & (128**3 - 1)]
    def rough(self, k=0): return noise_bank().rough[(self.idx + int(self.off[32 + k])) & (128**3 - 1)]
    def folds(self, x, y, z): return ndi.map_coordinates(noise_bank().folds, self._grid(x, y, z), order=1, mode='grid-wrap', output=F)

def sample_head(rng):
    "Random anatomy: every length in mm, every density in HU."
    u, n = rng.uniform, rng.normal
    age = u(0, 1)**.75                       # 0 young and tight, 1 old and shrunken
    a = n(66, 3.2)
    g = NS(a=a, b_front=n(82, 4), b_back=n(84, 5), c=n(70, 4), e=u(2.1, 2.55), egg=u(-.02, .10), flat=n(0, .02),
        skull=u(3.5, 8.5), skull_front=u(.8, 1.5), skull_back=u(.9, 1.6), diploe=u(250, 1100), table=u(1150, 1850),
        scalp=u(2.5, 8.5), fat=u(-110, -80), age=age,
        csf=u(2, 10), wm=n(26.5, 1.6), csf_gap=.4 + age**2*u(0, 4.5), sulci=(.22 + .36*age**1.3)*u(.65, 1.35), sulci_depth=u(12, 19) + 6*age,
        vent=(.78 + age*u(.15, 1.25)), vent_asym=n(0, .16), third=u(.8, 1.8) + 3*age**2, cist=u(.8, 1.3) + .8*age, sylv=u(1.2, 2.6) + 3.2*age**1.5,
        falx=u(35, 60), falx_width=u(.5, 1.1), sinus=u(45, 64), fissure=u(.3, .9) + 1.6*age**2, tent=u(38, 58),
        pineal=u() < .7, pineal_hu=u(60, 320), choroid=u() < .72, choroid_hu=u(60, 420), choroid_r=u(1.5, 5),
        falx_calc=u() < .22, bg_calc=u() < .14, carotid=u() < .4, dense_sinus=u() < .12, basilar=u(38, 62),
        wmd=u() < .15 + .6*age**2, wmd_hu=u(5, 13), cup=u(.0, 7), cup_len=u(3, 8),
        cavum=u() < .12, frontal=u(0, 1), mastoid=u(.3, 1), opac=u() < .25, scalp_bump=u() < .25)
    g.gm = g.wm + n(10.5, 1.5); g.nuclei = g.wm + n(6.5, 1.3)
    g.bumps = [(u(-1, 1), u(-1, 1), u(0, 1), u(2, 10), u(10, 28)) for _ in range(rng.integers(1, 3))] if g.scalp_bump else []
    g.infarcts = []
    if u() < .28:
        for _ in range(rng.integers(1, 4)):
            r = u(3, 9) if u() < .6 else u(12, 34)
            s = rng.choice([-1, 1])
            g.infarcts.append((np.array([s*u(14, 55), u(-50, 60), u(-10, 45)]), r, u(-21, -5)))
    return g

def cavity(g, x, y, z):
    "Signed depth under the inner table of the vault in mm (positive inside)."
    b = np.where(y < 0, F(g.b_front), F(g.b_back))
    low = np.clip(-z/65, 0, 1.6)
    aw = g.a*(1 + g.egg*y/80 - .10*smoothstep(20, 85, -y) + g.flat*np.sign(x))*(1 - .17*low*low)
    bw = b*(1 - .10*low*low)
    qx, qy, qz = np.abs(x)/aw, np.abs(y)/bw, np.maximum(z, 0)/g.c
    e = g.e
    px, py, pz = qx**(e-1), qy**(e-1), qz**(e-1)
    rho = (px*qx + py*qy + pz*qz + 1e-9)**(1/e)
    grad = np.sqrt((px/aw)**2 + (py/bw)**2 + (pz/g.c)**2)*rho**(1-e) + 1e-6
    return (1 - rho)/np.maximum(grad, .006), rho

def floor_height(g, x, y):
    "Height of the skull base in mm: three steps, petrous ridges, sella, foramen magnum."
    ax = np.abs(x)
    ant = -25 + 7*np.exp(-((ax-28)/13)**2)*smoothstep(-88, -60, y)
    mid = -43 + 15*(1 - smoothstep(9, 19, ax)) - 6*np.exp(-(x/7)**2 - ((y+6)/6)**2)
    post = -64 + 20*(ax/58)**2 + 13*((y-38)/46)**2
    fm = np.sqrt((x/15)**2 + ((y-33)/18)**2)
    post = post - 80*(1 - smoothstep(.92, 1.06, fm))
    line = y - (0 + .5*ax)
    w1 = smoothstep(-36, -27, y + .12*ax)
    soft = 4 + 12*(1 - smoothstep(6, 16, ax))
    w2 = smoothstep(-3, soft, line)
    z = ant*(1-w1) + mid*w1*(1-w2) + post*w2
    ridge = -23 - 12*(1 - smoothstep(4, 30, ax)) + .12*(ax-40)
    rw = np.exp(-((line-1)/(6 + .09*ax))**2)*smoothstep(8, 16, ax)
    return z + np.maximum(ridge - z, 0)*rw

def ventricles(g, x, y, z):
    "Signed distances to the lateral ventricles (both sides), third and fourth ventricle."
    k = g.vent; m = k*(1 + np.sign(x)*g.vent_asym).astype(F); xs = np.abs(x)
    pts = [(18, -45, 5, 1.0), (14, -38, 8, 3.2), (9, -28, 11, 3.7), (4.8, -18, 13, 3.4), (8, -6, 20, 4.8), (11, 10, 24, 4.8), (16, 24, 21, 5.2), (23, 35, 11, 6.0), (24, 47, 7, 3.6), (20, 62, 5, 1.0)]
    off = 1.4*(k-1); z = 12 + (z-12)*.8
    out = np.minimum.reduce([capsule(xs, y, z, (p[0]+off, *p[1:3]), (q[0]+off, *q[1:3]), p[3]*m, q[3]*m) for p, q in zip(pts[:-1], pts[1:])])
    horn = [(23, 34, 10, 4), (31, 22, -9, 1.9), (30, 2, -20, 1.3)]
    out = np.minimum.reduce([out] + [capsule(xs, y, z, p[:3], q[:3], p[3]*m, q[3]*m) for p, q in zip(horn[:-1], horn[1:])])
    septum = np.abs(x) - (.7 if not g.cavum else -1)
    out = np.maximum(out, -septum)
    third = np.maximum(np.abs(x) - g.third, ellipsoid(x, y, z, (0, 2, 3), (30, 17, 11)))
    fourth = np.maximum(ellipsoid(x, y, z, (0, 34, -33), (8*k**.5+2, 5*k**.5+1, 12)), -(y - 28 - .04*x*x) )
    return out, third, fourth

def deep_nuclei(x, y, z):
    ax = np.abs(x)
    th = ellipsoid(ax, y, z, (11, 7, 6), (8, 14, 10))
    ca = np.minimum(ellipsoid(ax, y, z, (13, -24, 9), (5, 10, 9)), capsule(ax, y, z, (14, -20, 16), (18, 12, 24), 4, 2.5))
    le = ellipsoid(ax - .18*y*.6, y, z, (24.5, -6, 3), (6.5, 17, 10))
    return np.minimum(np.minimum(th, ca), le)

def brainstem(x, y, z):
    mid = ellipsoid(x, y, z, (0, 10, -10), (17, 13, 13))
    pons = ellipsoid(x, y, z, (0, 12, -30), (17, 13.5, 15))
    med = capsule(x, y, z, (0, 18, -38), (0, 31, -95), 9.5, 7)
    return np.minimum(np.minimum(mid, pons), med)

KINDS = ['epidural', 'intraparenchymal', 'intraventricular', 'subarachnoid', 'subdural']

def surface_point(g, d):
    "Point of the inner table in direction `d` from the centre of the head."
    d = np.asarray(d, F); d = d/np.linalg.norm(d); p = d*60
    for _ in range(6):
        _, rho = cavity(g, *[np.array([v], F) for v in p]); p = p/rho[0]
    return p

def sample_bleeds(rng, g):
    "A plausible combination of bleeds, each a namespace that `paint_brain` draws."
    u = rng.uniform; out = []
    def side(): return int(rng.choice([-1, 1]))
    def hu(): return u(52, 84) if u() < .8 else u(44, 56)
    def iph(c, r, **k): out.append(NS(kind=1, c=np.array(c, F), r=np.array([r*u(.75, 1.3) for _ in range(3)], F), hu=hu(), rough=u(.08, .42), edge=u(1.5, 4), edema=u(1.5, 4 + .35*r), edema_hu=-u(4, 13), push=u(.1, .5), het=u(1, 6), **k))
    def deep(): s = side(); return iph([(s*u(16, 32), u(-18, 12), u(-4, 18))], 1)
    def sdh(s=None, thick=None):
        acute = u()
        h = u(52, 82) if acute < .68 else (u(36, 48) if acute < .76 else u(16, 28))
        out.append(NS(kind=4, shape='crescent', s=s or side(), phi=u(-35, 35), w=u(38, 88), z=u(-5, 45), h=u(22, 60), t=thick or (u(2.2, 6) if u() < .45 else u(5, 17)), hu=h, layer=(h < 35)*u(.3, 1)*45, mix=u(0, 8) if u() < .6 else u(8, 22), power=u(.45, .9), push=u(.5, 1)))
    def falcine(): out.append(NS(kind=4, shape='falx', s=side(), y=u(-50, 55), w=u(20, 60), z=u(25, 60), h=u(15, 45), t=u(2, 8), hu=hu(), layer=0, mix=u(0, 5)))
    def tentorial(): out.append(NS(kind=4, shape='tent', s=side(), t=u(2.5, 7), hu=hu(), layer=0, mix=u(0, 5), w=u(25, 50)))
    def edh():
        s = side(); phi = np.deg2rad(u(-65, 65)); el = np.deg2rad(u(-12, 55)); d0 = u(15, 40)
        out.append(NS(kind=0, c=surface_point(g, (s*np.cos(phi)*np.cos(el), np.sin(phi)*np.cos(el), np.sin(el))), s=s, d0=d0, t=d0*u(.3, .62), hu=u(56, 84), swirl=u(0, 22) if u() < .35 else 0, push=u(.5, .9)))
    def sah(c, r, s=None): out.append(NS(kind=3, c=np.array(c, F), r=r, hu=u(48, 76), fill=u(.55, 1), swell=u(.3, 1.5)))
    def sah_cistern(): sah((u(-6, 6), u(-16, 2), u(-22, -8)), u(30, 62)); [sah((s*u(30, 44), u(-22, 0), u(-5, 12)), u(18, 34)) for s in (-1, 1) if u() < .45]
    def sah_convex():
        for _ in range(rng.integers(1, 4)):
            s = side(); phi, el = np.deg2rad(u(-70, 80)), np.deg2rad(u(-10, 65))
            sah(surface_point(g, (s*np.cos(phi)*np.cos(el), np.sin(phi)*np.cos(el), np.sin(el)))*.93, u(12, 36))
    def ivh(heavy=None):
        heavy = u() < .4 if heavy is None else heavy
        out.append(NS(kind=2, hu=u(46, 80), level=[(u(28, 58) if u() < .75 else 99) for _ in range(2)] if not heavy else [(u(-60, 30) if u() < .75 else u(30, 60)) for _ in range(2)], third=heavy and u() < .7 or u() < .15, fourth=heavy and u() < .6 or u() < .12, rough=u(0, 5), mix=u(.7, 1)))
        if min(out[-1].level) > 60 and not out[-1].third: out[-1].level[side()] = u(28, 52)
    def r_iph(): return u(4, 11) if u() < .45 else u(10, 27)
    def basal(): s = side(); iph((s*u(17, 31), u(-20, 8), u(-2, 18)), r_iph())
    def thalamic(): s = side(); iph((s*u(8, 16), u(0, 14), u(2, 14)), u(4, 15))
    def lobar(): s = side(); iph((s*u(18, 48), u(-55, 58), u(8, 50)), r_iph())
    def temporal(): s = side(); iph((s*u(36, 52), u(-22, 20), u(-32, -8)), u(5, 17))
    def posterior(): iph((u(-28, 28), u(38, 58), u(-46, -24)), u(5, 17)) if u() < .75 else iph((u(-5, 5), u(6, 14), u(-36, -22)), u(4, 9))
    def contusion():
        for _ in range(rng.integers(1, 4)):
            s = side(); c = [(s*u(10, 30), u(-68, -48), u(-18, 12)), (s*u(40, 56), u(-30, 10), u(-34, -8)), (s*u(30, 55), u(-30, 40), u(5, 45))][rng.integers(3)]
            iph(c, u(3, 12))
    def any_iph(): [basal, thalamic, lobar, temporal, posterior, contusion][rng.choice(6, p=[.26, .16, .28, .1, .12, .08])]()
    k = rng.choice(9, p=[.28, .16, .10, .13, .11, .06, .09, .03, .04])
    if k == 0:                                             # spontaneous bleed into the brain
        any_iph()
        if u() < .38: ivh()
        if u() < .15: sah_convex()
    elif k == 1:                                           # trauma: several at once
        n0 = rng.permutation(5)[:rng.integers(2, 4)]
        for i in n0: [sdh, sah_convex, contusion, edh, falcine][i]()
        if u() < .12: ivh(False)
    elif k == 2: edh(); (u() < .3) and sah_convex()
    elif k == 3:                                           # burst aneurysm
        sah_cistern()
        if u() < .45: ivh()
        if u() < .15: temporal()
    elif k == 4: sdh(); (u() < .22) and sdh(-out[0].s)
    elif k == 5: sah_convex()
    elif k == 6: ivh()
    elif k == 7: falcine(); (u() < .5) and sdh()
    else: tentorial(); (u() < .5) and sdh()
    if any(b.kind in (2, 3) for b in out) and u() < .35: g.vent *= u(1.15, 1.5)
    return out

def paint_brain(g, bleeds, f, x, y, z, ys, depth, zdepth):
    """HU of points inside the skull, and the share of each kind of bleed in them (5, n).
    `f` holds the study's random fields, `ys` the height against gravity, `depth` the distance to the inner table."""
    n = len(x); T = np.zeros(n, F); ext = []; f = f.at(x, y, z)
    ox, oy, oz = x.copy(), y.copy(), z.copy()             # where this tissue lay before it was pushed aside
    rr = np.sqrt(x*x + y*y + (z-5)**2) + 1
    vault = depth
    wob = f.low(0)
    tight = np.zeros(n, F)
    for b in bleeds:
        if b.kind == 4 and b.shape == 'crescent':
            phi = np.rad2deg(np.arctan2(y, np.maximum(x*b.s, .1)))
            q = ((phi - b.phi)/b.w)**2; v = ((z - b.z)/b.h)**2
            t = b.t*(np.clip(1 - q, 0, 1)*np.clip(1 - v, 0, 1))**b.power*(1 + .12*wob)*smoothstep(0, 6, x*b.s)
        elif b.kind == 0:
            d = np.sqrt((x-b.c[0])**2 + (y-b.c[1])**2 + (z-b.c[2])**2)
            lens = b.t*np.clip(1 - ((d**2 - np.minimum(vault, d)**2)/b.d0**2), 0, 1)
            t = lens*smoothstep(b.d0*1.9, b.d0*1.3, d)*smoothstep(0, 5, x*b.s)
        else: continue
        sd = vault - t
        ext.append((b, np.where(t > .4, inside(sd, 1.2)*smoothstep(.4, 1.2, t), 0), sd))
        dec = b.push*np.clip(1 - vault/95, 0, 1)
        m = t*dec
        ox += m*x/rr; oy += m*y/rr; oz += m*z/rr
        side = smoothstep(-10, 25, x*b.s)
        # the whole half of the brain gives way towards the other side
        shift = b.push*.28*b.t*np.exp(-((z-10)/45)**2 - (y/70)**2)*np.exp(-(np.minimum(x*b.s, 0)/28)**2)
        ox += b.s*shift
        tight += side*min(b.t/9, 1)
        T = np.maximum(T, t)
    for b in bleeds:
        if b.kind == 1:
            d = np.stack([x-b.c[0], y-b.c[1], z-b.c[2]]); r = np.sqrt((d*d).sum(0)) + .1; R = float(b.r.mean())
            m = b.push*R*np.exp(-np.maximum(r-R, 0)/(1.3*R))*np.minimum(r/R, 1)
            ox -= m*d[0]/r; oy -= m*d[1]/r; oz -= m*d[2]/r
            tight += np.exp(-(r/(2.5*R))**2)*min(R/16, 1)
    tight = np.clip(tight, 0, 1)
    db = vault - T - g.csf_gap*(1 + .35*wob)*(1 - .6*tight)
    ax = np.abs(ox)
    # subarachnoid blood: where it may be
    sahm = np.zeros(n, F); sah_hu = np.zeros(n, F); swell = np.zeros(n, F)
    for b in bleeds:
        if b.kind == 3:
            d = np.sqrt((x-b.c[0])**2 + (y-b.c[1])**2 + (z-b.c[2])**2)*(1 + .22*wob)
            m = smoothstep(b.r, b.r*.55, d)*b.fill
            sah_hu = np.where(m > sahm, b.hu, sah_hu); swell = np.maximum(swell, m*b.swell); sahm = np.maximum(sahm, m)
    # sulci: sheets that stand on the surface, from the zeros of a random field carried inwards along the radius
    rho = np.clip(1 - vault/70, .35, 1)
    k = (1/rho - 1)*.5 + 1
    nz = f.folds(x*k, y*k, z*k) + .2*wob + .28*f.rough(21)
    cereb_z = 13 - .40*ax - .30*np.maximum(oy-22, 0) - .1*np.maximum(22-oy, 0) + 2*wob
    infra = smoothstep(-1, 1, cereb_z - oz)*smoothstep(-6, 6, oy - (2+.45*ax))   # below the tentorium
    width = (g.sulci*(1 - .55*tight) + .26*swell)*(1 + .5*f.low(1))
    deep = np.clip(1 - db/(g.sulci_depth*np.clip(1 + .45*f.low(20), .35, 2)), 0, 1)
    sul = np.clip((width*(.5 + .5*deep) - np.abs(nz))/.16 + .5, 0, 1)*smoothstep(0, .2, deep)*(1-infra)*(db > -2)
    sul *= smoothstep(-30, -10, oz + .3*ax) *.85 + .15
    near = np.abs(nz)/.45 + 1.5*smoothstep(g.sulci_depth-5, g.sulci_depth+7, db)   # distance to a sulcus in cortical thicknesses
    gray = np.maximum(inside(db - 3.1 - .8*wob, 2.), np.clip(1.5 - near, 0, 1)*(.55 + .45*sul)*(db > 0))
    wmv = g.wm + .8*wob
    hu = wmv + (g.gm - wmv)*gray*.95 + 1.1*f.rough(22)
    paint(hu, inside(deep_nuclei(ox, oy, oz) + 1.2*wob, 3), g.nuclei)
    if g.wmd:
        v0 = ellipsoid(ax, oy, oz, (15, 0, 22), (14, 48, 18)); hu -= g.wmd_hu*smoothstep(9, -4, v0 + 5*wob)*(1-gray)
    for c, r, dv in g.infarcts:
        d = ellipsoid(ox, oy, oz, c, (r, r*1.1, r*.9)) + r*.3*f.rough(0)
        hu += dv*inside(d, 4)
    # cerebellum: folia are thin and run side by side
    rag0 = f.rough(1)
    fol = np.sin((oz*.9 + np.abs(ox)*.35 + oy*.25 + 2.6*wob + .6*rag0)*1.25)
    hc = g.gm - 4 + 1.3*rag0 + 1.3*fol*(1 + .5*rag0) - 4*smoothstep(14, 30, db)*smoothstep(6, 12, ax)
    hc -= (g.gm - g.csf)*.5*np.clip((fol - .86 + .1*g.age)/.1, 0, 1)*smoothstep(9, 0, db)*g.age
    hu += infra*(hc - hu)
    bs = brainstem(ox, oy, oz)
    paint(hu, inside(bs, 2), g.wm + 3.5)
    # fluid outside the brain
    csf = np.maximum(inside(db, 1.5), sul)
    c = g.cist*(1 - .5*tight)
    rag = f.rough(0)
    wc = c*(1.1 + .8*rag*(oz > -26))
    shell = inside(np.abs(bs - wc) - wc, 1.5)*smoothstep(30, 20, ax)*smoothstep(-1, -8, oz + .15*oy)*smoothstep(-75, -55, oz)*np.clip(.75 + .4*rag, 0, 1)
    shell = np.maximum(shell, inside(ellipsoid(ox, oy, oz, (0, -4, -11), (3.5*c, 5*c, 6)), 1.5))
    th = np.arctan2(ox, -(oy+8)); star = ellipsoid(ox, oy, oz, (0, -9, -19), (12.5, 11, 7))/(1 + .22*np.cos(5*th)) - (c-1)*3 + .7*rag
    quad = ellipsoid(ox, oy - .03*ox*ox, oz, (0, 23, -1), (10*c, 3*c, 6)) + .7*rag
    magna = ellipsoid(ox, oy, oz, (0, 56, -56), (6.5*c, 5*c, 8)) + rag
    svz = -9 + .42*(oy+22); w = (g.sylv*(1 - .6*tight) + .8*swell)
    sy = np.maximum(np.abs(oz - svz - 5*wob - 2.5*rag) - w*.9*np.clip(.55 + .5*f.low(2), .1, 2), np.maximum(36 - ax + 5*wob, np.maximum(-34 - oy, oy - 26) + 5*f.low(21) + 2*rag))
    ins = np.maximum(np.abs(ax - 39 + .008*(oy+5)**2 + 2.5*wob + 1.3*rag) - w*.6*np.clip(.7 + .5*f.low(3), .1, 2), np.maximum(np.abs(oy+6) - 23, np.abs(oz-4) - 15))
    gyr = np.abs(f.rough(20))                                    # a fissure is ragged
    fluid = np.maximum.reduce([shell, inside(star, 2), inside(quad, 2), inside(magna, 2), inside(sy + .8*gyr, 1.5), inside(ins + .8*gyr, 1.5)])
    hem = (np.abs(ox + 1.6*wob + .5*rag) - g.fissure*(1 - .7*tight) - .9*swell*.5 - 1.4*np.clip(.5-np.abs(nz), 0, .5))
    cc = ellipsoid(ox, oy, oz, (0, -2, 6), (60, 40, 22))                          # callosum and below: no fissure
    hemi = inside(hem, 1.5)*smoothstep(-2, 3, cc)*smoothstep(-18, -8, oz)*(1-infra)
    csf = np.maximum.reduce([csf, fluid, hemi])
    csf = np.where(infra > .5, np.maximum(np.maximum(inside(db, 1.5), shell), inside(magna, 2)), csf)
    hu += csf*(g.csf - hu)
    masks = np.zeros((5, n), F)
    if sahm.any():
        m = csf*sahm*np.clip(.8 + .35*f.rough(0), 0, 1); hu += m*(sah_hu - hu); masks[3] = m
    # ventricles
    lat, third, fourth = ventricles(g, ox, oy, oz)
    lat = lat + .7*wob + .35*rag; vo = [inside(lat, 1.5), inside(third, 1.5)*smoothstep(4, 1, oz-8), inside(fourth, 1.5)]
    allv = np.maximum.reduce(vo); paint(hu, allv, g.csf)
    for b in bleeds:
        if b.kind == 2:
            lv = np.where(x < 0, b.level[0], b.level[1])
            m = vo[0]*inside(lv - ys + b.rough*f.rough(0)*(lv < 30), 2.5)
            if b.third: m = np.maximum(m, vo[1])
            if b.fourth: m = np.maximum(m, vo[2])
            m = m*b.mix; hu += m*(b.hu + 2*f.rough(0) - hu); masks[2] = np.maximum(masks[2], m)
    # what is dense in a healthy head
    if g.choroid:
        for s in (-1, 1):
            d = ellipsoid(ox*s, oy, oz, (21, 36, 10), (g.choroid_r, g.choroid_r*1.6, g.choroid_r*1.1)); paint(hu, inside(d + .9*f.rough(0), 1.5)*np.clip(.6+.4*f.rough(2), .1, 1), g.choroid_hu)
    if g.pineal: paint(hu, inside(ellipsoid(ox, oy, oz, (0, 22, 6), (2.2, 2.6, 2.2)) + .5*f.rough(0), 1.5), g.pineal_hu)
    if g.bg_calc: paint(hu, inside(ellipsoid(ax, oy, oz, (19, -4, 2), (2.5, 6, 4)) + 1.2*f.rough(0), 3)*.6, 75)
    if g.carotid: paint(hu, inside(capsule(ax, oy, oz, (11, -8, -26), (12, -14, -22), 1.6, 1.4), 1.2), 350)
    paint(hu, inside(capsule(ox, oy, oz, (0, -3, -42), (0, -5, -16), 1.6, 1.4), 1.2), g.basilar)
    paint(hu, inside(capsule(ax, oy, oz, (10, -10, -15), (36, -12, -11), 1.2, 1), 1.2), g.basilar - 4)
    # dura: falx, tentorium, sinuses
    fx = np.abs(x + .6*wob) - g.falx_width*.5
    fz = smoothstep(-2, 4, ellipsoid(x, y, z, (0, -6, 2), (60, 54 - 8*g.age, 32)))*smoothstep(-14, -6, z)*(1-infra)
    falx = inside(fx, 1.1)*fz; paint(hu, falx, g.falx)
    if g.falx_calc: paint(hu, inside(fx - .9, 1.1)*fz*smoothstep(1.1, 1.6, f.low(4)), 190)
    tent = inside(np.abs(cereb_z - z) - .7, 1.3)*smoothstep(2, 12, y - (8+.45*np.abs(x)))*smoothstep(.5, 2, db + 4); paint(hu, tent*.8, g.tent)
    sh = g.sinus + (16 if g.dense_sinus else 0)
    sss = np.maximum(np.abs(x)*1.15 + vault*.75 - 5.2, -(y + 75*(z > 30) - 20*(z <= 30)))
    paint(hu, inside(sss, 1.5)*smoothstep(-8, 4, z), sh)
    ts = np.sqrt((cereb_z - z)**2 + (np.maximum(vault-3, 0)*1.1)**2) - 4.2
    paint(hu, inside(ts, 1.5)*smoothstep(22, 40, y), sh - 2)
    torc = ellipsoid(x, y, z, (0, g.b_back-4, -8), (7, 5, 7)); paint(hu, inside(torc, 1.5), sh)
    for b in bleeds:
        if b.kind == 4 and b.shape == 'falx':
            t = b.t*(np.clip(1 - ((y-b.y)/b.w)**2, 0, 1)*np.clip(1 - ((z-b.z)/b.h)**2, 0, 1))**.6*(1+.15*wob)
            m = inside(x*b.s - t, 1.2)*(x*b.s > -1)*fz*(t > .5); v = b.hu
        elif b.kind == 4 and b.shape == 'tent':
            h = z - cereb_z; m = inside(h - b.t*np.clip(1 - ((np.abs(x)-20)/b.w)**2, 0, 1), 1.2)*(h > -1)*smoothstep(2, 10, y - (8+.45*np.abs(x)))*(x*b.s > 0); v = b.hu
        elif b.kind == 1:
            q = np.sqrt(((x-b.c[0])/b.r[0])**2 + ((y-b.c[1])/b.r[1])**2 + ((z-b.c[2])/b.r[2])**2); R = float(b.r.mean())
            sd = (q-1)*R + b.rough*R*f.rough(0)
            ed = np.clip(1 - sd/b.edema, 0, 1)*(sd > -1)*(1 - .8*np.maximum(csf, allv))*(1 - .5*gray); hu += b.edema_hu*ed
            keep = 1 - .85*inside(db - .5, 1.5)
            m = inside(sd, b.edge)*keep; v = b.hu + b.het*f.rough(3) - 6*inside(sd + .3*R, R*.5)*(f.rough(4) > 1)
        else: continue
        hu += m*(v - hu); masks[b.kind] = np.maximum(masks[b.kind], m)
    for b, m, sd in ext:
        v = b.hu
        if b.kind == 4: v = b.hu + b.layer*smoothstep(-10, 45, ys + 6*wob) + b.mix*f.rough(0)*.7
        if b.kind == 0 and b.swirl: v = b.hu - b.swirl*(smoothstep(.2, 1, f.rough(0)))
        hu += m*(v - hu); masks[b.kind] = np.maximum(masks[b.kind], m)
    hu += g.cup*np.exp(-np.maximum(zdepth, 0)/g.cup_len)                           # beam hardening under the bone
    return hu, masks

def paint_slice(g, bleeds, f, x, y, z, py):
    "HU and bleed shares of one thin slice: 2-D head coordinates in mm; `py` = height against gravity."
    shape = x.shape; noise = f; f = f.at(x, y, z)
    hu = np.full(shape, -1000, F); masks = None
    wob = f.low(5)
    dv, rho = cavity(g, x, y, z)
    wb = f.rough(5) if z.min() < 5 else wob
    zf = floor_height(g, x + 3*wob + 1.2*wb, y + 3*f.low(6) + 1.2*wb) + 1.5*wob + .8*wb
    zc = (z - zf)*.85
    d = np.minimum(dv, zc)
    ax = np.abs(x)
    t = g.skull*(1 + .13*wob)*(1 + (g.skull_front-1)*smoothstep(30, 75, -y))*(1 + (g.skull_back-1)*smoothstep(30, 75, y))
    t = t*(1 - .35*np.exp(-((ax-g.a)/12)**2 - (y/35)**2)*smoothstep(25, 0, z))
    temporal = 11*np.exp(-((y+18)/24)**2)*smoothstep(24, -8, z)*smoothstep(30, 55, ax)
    scalp = g.scalp*(1 + .25*wob + .3*smoothstep(20, 80, y))
    for sx, sy, sz, h, w in g.bumps:
        p = surface_point(g, (sx, sy, sz)); scalp = scalp + h*np.exp(-((x-p[0])**2 + (y-p[1])**2 + (z-p[2])**2)/w**2)
    low = smoothstep(-5, -35, z)
    skin = -dv - t - temporal - scalp
    if z.min() < 0:                                          # face and neck hang below
        face = ellipsoid(x, y, z, (0, -38, -62), (60 + 3*wob, 60, 62)) + 40*smoothstep(-8, 4, z - .1*y)
        nose = ellipsoid(x, y, z, (0, -100, -68), (14, 16, 24))
        neck = np.maximum(np.sqrt((x/64)**2 + ((y-26)/62)**2)*63 - 63 - 3*wob, z + 30)
        ear = np.minimum(ellipsoid(ax, y, z, (g.a+t.mean()+13, 16, -34), (4, 14, 26)), ellipsoid(ax, y, z, (g.a+8, 10, -42), (9, 6, 6)))
        skin = np.minimum.reduce([skin, face, nose, neck, ear])
    body = inside(skin)
    paint(hu, body, 45)
    paint(hu, body*inside(skin + 2.2 + .6*wob)*inside(-skin - (scalp+2))*inside(dv + t + temporal - .5), g.fat)     # fat between skin and bone
    if z.min() < -20:
        soft = f.rough(6)
        m = inside(skin + 3)*smoothstep(-20, -32, z)*smoothstep(.42, .18, np.abs(soft))*inside(d)*.8
        paint(hu, m, g.fat)                                  # fat planes among muscles
    for sx, sy, sz, h, w in g.bumps:                         # swelling of the scalp is blood under the skin
        p = surface_point(g, (sx, sy, sz)); m = np.exp(-((x-p[0])**2 + (y-p[1])**2 + (z-p[2])**2)/(w*.9)**2)
        paint(hu, body*smoothstep(.3, .6, m)*inside(dv + t)*(h/10), 62)
    # bone
    cav = inside(-d, 1.2)
    base_t = 8 + 1.5*wob; line = y - .5*ax
    if z.min() < 5:
        ridge = np.exp(-((line-1)/(9 + .09*ax))**2)*smoothstep(6, 14, ax)*smoothstep(74, 60, ax)
        base_t = base_t + 26*ridge + 14*np.exp(-(x/13)**2)*smoothstep(-24, -8, y)*smoothstep(26, 14, y)
    shell = inside(-dv - t)*inside(-(z - zf + base_t)/1.5)
    frac = np.clip(-dv/np.maximum(t, .1), 0, 1)
    dip = smoothstep(.22, .4, frac)*smoothstep(.85, .66, frac)*inside(-zc - 3)
    bone = g.table - (g.table - g.diploe)*dip*(.85 + .15*wob)
    if z.min() < 5:
        tex = f.rough(7); bone = np.where(zc < -2, 650 + 380*tex*.6 + 350*ridge, bone)
    bo = shell*inside(d)
    paint(hu, bo, bone)
    if z.min() < 5:
        air = f.rough(8)
        def wall(sd, fill, w=1.6, hard=600): paint(hu, inside(sd - w)*body*inside(d + 1), hard); paint(hu, inside(sd)*body*inside(d + w), fill)
        if g.frontal > .25: wall(np.maximum(ellipsoid(x, y, z, (4*wob.mean(), -g.b_front-2.5-t.mean()*.2, -10), (8 + 26*g.frontal, 3.5 + 3*g.frontal, 8 + 14*g.frontal)) + .8*air, -(np.abs(x-2)-.6)), -980)
        mast = smoothstep(34, 44, ax)*np.exp(-((line-6)/15)**2)*smoothstep(-14, -24, z)*smoothstep(-66, -48, z)*g.mastoid
        paint(hu, bo*smoothstep(.1, .5, air + 1.6*mast - 1.2)*smoothstep(.05, .4, mast)*inside(zc + 3), -700)
        paint(hu, inside(capsule(ax, y, z, (52, 10, -40), (85, 8, -42), 3.2, 3.6))*body, -950)
    if z.min() < -15:
        for s in (-1, 1):
            xs = x*s
            cone = capsule(xs, y, z, (31, -70, -38), (13, -26, -36), 17, 4) + .8*air + .8*wob
            paint(hu, inside(cone - 2.2)*body*inside(d + 1)*smoothstep(-90, -82, y + .25*(60-ax)*(ax > 35)), 800); paint(hu, inside(cone)*body*inside(d + 2), g.fat + 8)
            for p, q, r in [((42, -64, -38), (17, -30, -36), 2.4), ((20, -64, -38), (12, -30, -36), 2.2), ((31, -66, -27), (15, -30, -32), 2.2), ((31, -66, -49), (15, -30, -40), 2.4)]: paint(hu, inside(capsule(xs, y, z, p, q, r, 1.6))*body, 52)
            paint(hu, inside(capsule(xs, y, z, (31, -66, -38), (13, -26, -36), 2.1, 2.2))*body, 34)
            gl = ellipsoid(xs, y, z, (32, -78, -38), (12, 12, 12)); paint(hu, inside(gl), 48); paint(hu, inside(gl + 1.6), 9)
            paint(hu, inside(ellipsoid(xs, y, z, (32, -87, -38), (4.5, 2.2, 4.5))), 82)
        sep = np.abs(np.sin(.42*y + .8*wob + .5*air)) < .2
        eth = np.maximum(np.maximum(ax - 11, np.abs(y + 54) - 20), np.abs(z + 40) - 13) + 1.3*air + wob; wall(eth, np.where(sep | (ax < .8), 250, -930))
        op = 30 if g.opac else -985
        wall(np.maximum(ellipsoid(x, y, z, (0, -19, -42), (14, 11, 9)) + .6*air, -(np.abs(x-1.5)-.6)), -985)
        wall(ellipsoid(ax, y, z, (28, -58, -70), (14, 17, 17)) + 1.5*air + 1.5*wob, np.where(x > 0, -985, op))
        nas = np.maximum(np.maximum(ax - 13, np.abs(y + 56) - 28), z + 52) + air + wob; wall(nas, np.where((np.abs(air) < .55) | (ax < 1), 40, -960))
        paint(hu, inside(ellipsoid(x, y, z, (0, -8, -80), (15, 9, 24)))*body, -990)
        paint(hu, inside(capsule(ax, y, z, (54, -50, -56), (68, -8, -50), 2.6, 3))*body, 900)
        paint(hu, inside(capsule(ax, y, z, (52, -4, -50), (44, -12, -110), 5.5, 5))*body*smoothstep(-48, -52, z), 1000)
        paint(hu, inside(capsule(ax, y, z, (48, -52, -48), (40, -60, -75), 3, 7))*body*inside(d + 2), 700)
        ring = np.maximum(np.abs(np.sqrt((x/1.25)**2 + (y-32)**2) - 19) - 4, np.abs(z + 82) - 7); paint(hu, inside(np.minimum(ring, ellipsoid(ax, y, z, (24, 30, -78), (9, 13, 10))))*body, 900)
        paint(hu, inside(capsule(x, y, z, (0, 17, -76), (0, 17, -120), 4.5, 8))*body, 850)
        canal = capsule(x, y, z, (0, 32, -62), (0, 32, -140), 14, 11); paint(hu, inside(canal)*(z < -60), 12)
        paint(hu, inside(capsule(x, y, z, (0, 31, -60), (0, 31, -140), 8, 6))*(z < -60), 34)
        arch = np.maximum(np.abs(np.sqrt((x/.85)**2 + ((y+46)/1.1)**2) - 26) - 4.5, np.maximum(np.abs(z + 98) - 9, y + 46)); th = np.arctan2(x, -(y+46))
        paint(hu, inside(arch)*body*(np.abs(np.sin(7*th)) > .18), 2100)
    # brain
    sel = d > -1
    if sel.any():
        b, m = paint_brain(g, bleeds, noise, x[sel], y[sel], z[sel], py[sel], np.minimum(dv, zc)[sel], d[sel])
        w = cav[sel]; hu[sel] = hu[sel]*(1-w) + b*w
        masks = np.zeros((5, *shape), F); masks[:, sel] = m*w
    return hu, masks

def rotation(ax, ay, az):
    cx, sx, cy, sy, cz, sz = np.cos(ax), np.sin(ax), np.cos(ay), np.sin(ay), np.cos(az), np.sin(az)
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])@np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])@np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])

@dataclass
class HeadStudy:
    "One synthetic head CT: what the scanner would write, and what it shows."
    hu: np.ndarray                # (slices, rows, columns) int16, HU
    areas: np.ndarray             # (slices, 5) visible area of each kind of bleed in mm2, in the order of `KINDS`
    positions: np.ndarray         # (slices, 3) ImagePositionPatient in mm
    orientation: np.ndarray       # (6,) ImageOrientationPatient
    spacing: float                # mm between pixels, both ways
    thickness: float              # mm between slices
    tilt: float                   # gantry tilt in degrees
    masks: np.ndarray = None      # (slices, 5, rows/2, columns/2) share of each kind in a pixel, if asked for

def visible_areas(masks, mm2):
    "Area (mm2) in which a kind of bleed fills at least 40 % of the pixel: what a reader could point at."
    return (masks >= .4).sum((-2, -1))*mm2

def make_head(seed, bleeding, size=512, n_sub=3, keep_masks=False):
    "A `HeadStudy` from a seed. The anatomy is drawn at half the resolution in `n_sub` thin layers a slice, then scanned."
    rng = np.random.default_rng(seed); u = rng.uniform
    g = sample_head(rng); bleeds = sample_bleeds(rng, g) if bleeding else []
    noise = Noise(rng); n_px = size//2
    thick = float(rng.choice([4.5, 5., 5., 5.5, 6.])); tilt = 0. if u() < .4 else u(4, 24)*(1 if u() < .85 else -1)
    R = rotation(np.deg2rad(rng.normal(6, 7) - .75*tilt), np.deg2rad(rng.normal(0, 4)), np.deg2rad(rng.normal(0, 6))).astype(F)
    z0, z1 = u(-78, -52), u(78, 92)
    n = int(np.clip(round((z1-z0)/thick), 20, 40))
    fov = u(205, 255); sp = fov/n_px; off = rng.normal(0, 6, 2)
    col = np.array([0, np.cos(np.deg2rad(tilt)), -np.sin(np.deg2rad(tilt))])
    i = ((np.arange(n_px) + .5)*sp - fov/2).astype(F); table = sample_table(rng)
    stack = np.zeros((n, n_px, n_px), F); masks = np.zeros((n, 5, n_px, n_px), F)
    px = np.broadcast_to(i[None, :] + F(off[0]), (n_px, n_px)); py = np.broadcast_to(i[:, None]*F(col[1]) + F(off[1]), (n_px, n_px))
    for s in range(n):
        for k in range(n_sub):
            pz = np.broadcast_to(F(z0 + (s + (k+.5)/n_sub)*thick) + i[:, None]*F(col[2]), (n_px, n_px))
            hu, m = paint_slice(g, bleeds, noise, *(R[a, 0]*px + R[a, 1]*py + R[a, 2]*pz for a in range(3)), py)
            stack[s] += hu/n_sub
            if m is not None: masks[s] += m/n_sub
        paint_table(table, stack[s], px, py)
    first = -fov/2 + sp/4
    pos = np.array([[first + off[0], first*col[1] + off[1], z0 + (s+.5)*thick + first*col[2]] for s in range(n)])
    return HeadStudy(scan(stack, rng, sp/2, size), visible_areas(masks, sp*sp), pos, np.array([1, 0, 0, *col]), sp/2, thick, tilt, masks if keep_masks else None)

def sample_table(rng):
    "Head holder or table top: an arc or a plate, or nothing."
    u = rng.uniform
    return NS(kind=rng.choice(["arc", "plate", "none"], p=[.55, .3, .15]), radius=u(105, 125), y=u(-8, 6), half=u(.8, 2.2), hu=u(-150, 500), span=u(.6, 1.5))

def paint_table(t, hu, px, py):
    "Draw the table into a slice in the scanner's own coordinates (mm)."
    if t.kind == "none": return
    if t.kind == "arc": sd = np.maximum(np.abs(np.hypot(px, py - t.y) - t.radius) - t.half, (np.abs(np.arctan2(px, py - t.y)) - t.span)*100)
    else: sd = np.maximum(np.abs(py - t.radius*.96) - t.half*1.5, np.abs(px) - 70)
    paint(hu, inside(sd)*(hu < -500), t.hu)

def scan(stack, rng, sp, size=512):
    "Detector: blur, correlated noise, streaks."
    u = rng.uniform; n = len(stack)
    sigma = u(.45, .85)/sp; level = u(2, 4.6) if u() < .8 else u(4.6, 7.5); tex = u(.8, 1.6)
    fy, fx = np.meshgrid(fft.fftfreq(size), fft.rfftfreq(size), indexing='ij'); r = np.sqrt(fx**2 + fy**2)/(.5/ (tex*1.15))
    H = (r*np.exp(-(r*1.35)**2)).astype(F); H[0, 0] = 0
    yy, xx = np.mgrid[:size, :size].astype(F)/size - .5
    fall = (1.15 - 1.1*(xx**2 + yy**2)*2).astype(F)
    out = np.empty((n, size, size), np.int16)
    sharp = u(0, .7) if u() < .35 else 0
    for s in range(n):
        a = cv2.resize(stack[s], (size, size), interpolation=cv2.INTER_CUBIC)
        b = cv2.GaussianBlur(a, (0, 0), sigma)
        if sharp: b += sharp*(np.clip(b, -200, 400) - cv2.GaussianBlur(np.clip(b, -200, 400), (0, 0), 1.6))
        w = fft.rfft2(rng.standard_normal((size, size), dtype=F), workers=1); nz = fft.irfft2(w*H, s=(size, size), workers=1); nz /= nz.std()
        prof = (a > 500).mean(1); bone = np.sort(prof)[-40:].mean()      # how much bone the thickest rows hold
        b += nz*level*fall*(1 + 1.6*max(bone-.12, 0))
        heavy = max(bone - .2, 0)
        if heavy > 0:                                       # dark and bright bands between thick bones
            prof = ndi.gaussian_filter1d(prof.astype(F), 6)
            band = ndi.gaussian_filter1d(rng.standard_normal(size).astype(F), 3)*9 - 6
            ang = np.deg2rad(rng.normal(0, 6)); M = cv2.getRotationMatrix2D((size/2, size/2), np.rad2deg(ang), 1)
            st = (prof*band)[:, None]*np.exp(-(xx*3.6)**2)*7*u(.2, 1)*min(heavy/.1, 1)
            b += cv2.warpAffine(st.astype(F), M, (size, size))*(a > -300)
        out[s] = np.clip(np.rint(b), -1024, 3071)
    return out
