"""Does a worker's memory stay flat, and does its time grow linearly?

npy.convert with one worker, in a fresh process each, on 1×, 4× and 16× as many studies, and on one study as long as the longest neck CT."""
import common
import files

LIMIT = 500                                                # MB
FLAT, LINEAR = 1.1, .8                                     # peak of 16× over that of 1×, at most; images/s of 16× over those of 1×, at least


def once(o, studies: list) -> dict: # figures
    "Convert these studies, after one small study that brings in the libraries."
    out = str(o.work/"out"/"memory")
    a = common.run_once("conversion", "ours", warm=dict(studies=[studies[0][:5]], out=out), seconds=o.seconds, studies=studies, out=out)
    if a["value"] != sum(map(len, studies)): raise ValueError(f"{a['value']} of {sum(map(len, studies))} slices were written")
    return common.summary([a]) | dict(seconds=a["seconds"]/a["repeats"])


def measure(o) -> dict:
    "All sizes, one after the other."
    one = max(o.studies//4, 1); studies = files.write_set(o.work/f"plain-{o.slices}", 16*one, o.slices)
    figures = {f"{k}×": once(o, studies[:k*one]) for k in (1, 4, 16)}
    figures["neck"] = once(o, [files.write_neck(o.work, 60 if o.quick else 1082)])
    return dict(rows=[line(k, f, figures["1×"]) for k, f in figures.items()], notes=[f"memory: a fresh process each; {figures['1×']['start_mb']:,.0f} MB of the peak were there when libraries and header table were loaded"], figures=figures)


def line(k: str, f: dict, first: dict) -> dict:
    "One size beside the smallest."
    peak = common.peak_of(f); memory = f", {'met' if peak < LIMIT else 'MISSED'}"; target = f"< {LIMIT} MB"
    what = f"one study of {f['images']:,} slices, {f['seconds']:.1f} s" if k == "neck" else f"{k} studies: {f['images']:,} slices, {f['seconds']:.1f} s"
    if k == "16×":
        target += f"; memory ≤ {FLAT} × and images/s ≥ {LINEAR} × of 1×"
        return common.row("memory", what, f, target, f"memory {common.verdict(peak/common.peak_of(first), FLAT, least=False)}; images/s {common.verdict(f['rate']/first['rate'], LINEAR)}", memory=memory)
    return common.row("memory", what, f, target, memory=memory)


if __name__ == "__main__": common.main(measure, __doc__)
