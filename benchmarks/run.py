"All benchmarks in one run: prints one table; writes results.md, results.json and scaling.md."
import json
import time

import common
import conversion
import headers
import memory
import scaling

SCRIPTS = dict(conversion=conversion, headers=headers, memory=memory)


def describe(m: dict) -> list: # lines
    "The machine, in words."
    return [f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}", f"load at the start: {m['load']} (other work on the machine shows here)", ", ".join(f"{k} {v}" for k, v in m["versions"].items())]


def main(argv=None):
    o = common.options(__doc__, argv); start = time.time(); machine = common.machine(); results = {}
    with common.work_folder(o):
        for name, script in SCRIPTS.items():
            print(f"{time.time() - start:4.0f} s  {name}", flush=True); results[name] = script.measure(o)
    rows, notes, tables = ([x for r in results.values() for x in r.get(k, [])] for k in ("rows", "notes", "tables"))
    notes += describe(machine) + [f"the run took {time.time() - start:.0f} s; `{'quick' if o.quick else 'full'}`, {o.studies} studies, {o.rounds} rounds"]
    body = common.report(rows, notes, tables); print("\n" + body)
    if o.out is None: print("a quick run: nothing was written"); return
    o.out.mkdir(parents=True, exist_ok=True)
    kept = dict(quick=o.quick, machine=machine, figures={k: r["figures"] for k, r in results.items()})
    (o.out/"results.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (o.out/"results.md").write_text("# Measured\n\nWritten by `make bench`. What the rows mean: [README](README.md).\n\n" + body, encoding="utf-8")
    (o.out/"scaling.md").write_text(scaling.text(kept), encoding="utf-8")


if __name__ == "__main__": main()
