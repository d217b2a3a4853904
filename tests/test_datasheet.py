"""Oddities as sentences and the page of a data set, on the files of test_eda whose every oddity is known."""
import re

import pandas as pd
import pytest

from rsna_helpers import datasheet, dicom
from rsna_helpers.phantom import dicom_bytes
from test_eda import HEAD, close_figures, raw, run, tables, tags  # noqa: F401  fixtures


def test_oddities(tables):
    labels, headers = tables
    odd = datasheet.oddities(headers, labels).set_index("oddity")
    expected = {"files not readable, by their header or size": 2, "files with unsigned 12-bit pixels and an intercept over -100": 3, "files with signed 12-bit pixels": 1,
        "files with a picture that is not square": 1, "files of another size than 96 x 96": 1, "files with several windows": 4, "files with several windows that differ": 3, "files from a gantry tilted by more than 1 degree": 1,
        "images at the z of another of their series": 2, "studies with slices of several sizes": 1, "studies of a single image": 2, "patients in several splits": 1, "rows of the label file standing twice": 6, "images without labels": 1,
        "labels without images": 1, "labels never true": 2}
    found = odd["count"][odd["count"] > 0].to_dict()
    why = {k: found.pop(k) for k in list(found) if "because of" in k}
    assert found == expected and sum(why.values()) == 2 and any("PixelData truncated: # of # bytes" in k for k in why)
    assert odd.example["images without labels"] == "ID_d0" and odd.example["labels without images"] == "ID_gone" and odd.example["patients in several splits"] == "p2"
    assert odd.example["images at the z of another of their series"] in ("ID_b1", "ID_b2") and odd.what_then.str.len().min() > 0
    said = datasheet.sentences(datasheet.oddities(headers, labels))
    assert "3 files with unsigned 12-bit pixels and an intercept over -100, such as ID_b0: wrapped values are unwrapped, intercept -1000." in said
    assert "1 patient in several splits, p2: kept; folds group by patient." in said and said[-1].startswith("Looked for and not found: files with a rescale slope other than 1; ")


def test_oddities_of_pictures():
    "PNG files have no tags; that is not an oddity of each of them."
    headers = pd.DataFrame([dict.fromkeys(dicom.COLUMNS) | dict(image=f"i{k}", study="s", patient="p", split="train", format="png", rows=8, columns=8)  for k in range(3)])
    numbers = ["n_windows", "intercept", "slope", "bits_stored", "signed", "tilt", "z", "spacing_row", "spacing_col", "file_bytes"]
    headers[numbers] = headers[numbers].astype(float)
    labels = pd.DataFrame(dict(abnormal=[1]), index=pd.Index(["s"], name="study"))
    odd = datasheet.oddities(headers, labels)
    assert odd["count"].sum() == 0, odd[odd["count"] > 0]


def test_oddities_of_study_labels(tables):
    labels = pd.DataFrame(dict(patient_overall=[1, 0], C1=[1, 0], C2=[0, 0]), index=pd.Index(["a", "b"], name="study"))
    odd = datasheet.oddities(tables[1], labels).set_index("oddity")
    assert odd["count"]["studies without labels"] == 2 and odd.example["studies without labels"] == "c"


def test_mixed_orientations_are_found(tables):
    h = tables[1].copy(); at = h.index[h.image == "ID_a5"][0]; h[[f"ori_{i}" for i in range(6)]] = h[[f"ori_{i}" for i in range(6)]].astype(float)
    h.loc[at, [f"ori_{i}" for i in range(6)]] = [0., 1, 0, 0, 0, -1]
    odd = datasheet.oddities(h).set_index("oddity")
    assert odd["count"]["studies with slices of several orientations"] == 1 and odd.example["studies with slices of several orientations"] == "a" and "labels never true" not in odd.index


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def pages_tags(page):
    from html.parser import HTMLParser
    found = []
    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs): found.append((tag, dict(attrs)))
    Tags().feed(page.read_text(encoding="utf-8"))
    return found


def test_page_of_a_run(run, tables):
    page = datasheet.summary_page(run); text = page.read_text(encoding="utf-8")
    assert page == run.data/"summary.html" and not list(page.parent.glob(".summary*"))
    assert re.findall("<h2>(.*?)</h2>", text) == ["Overview", "Oddities", "Files", "Pixels", "Studies and geometry", "Windows in the headers", "Where it comes from", "Tags that are missing", "Labels", "Examples, drawn at random"]
    assert "3 files with unsigned 12-bit pixels and an intercept over -100" in text and "not readable: PixelData truncated" in text and "Explicit VR Little Endian" in text
    tags = pages_tags(page)
    assert all(a["src"].startswith("data:image/") for t, a in tags if t == "img") and not [a for t, a in tags if t in ("script", "link", "iframe") or "href" in a]
    assert datasheet.summary_page(run).read_text(encoding="utf-8") == text # the same data, the same page


def test_page_of_bare_headers(tables, run, tmp_path):
    "A table of `header_table` without labels, with a file that is gone."
    labels, headers = tables
    h = dicom.header_table([run.raw/p for p in headers.path] + [tmp_path/"gone.dcm"], n_jobs=1, progress=False)
    text = datasheet.summary_page(h, out=tmp_path/"a.html", n_examples=99).read_text(encoding="utf-8")
    assert "<h2>Labels</h2>" not in text and text.count("<figure>") == len(h) and text.count("not labelled") == len(h)
    with_labels = datasheet.summary_page(h, labels, tmp_path/"b.html", n_examples=0).read_text(encoding="utf-8")
    assert "<h2>Labels</h2>" in with_labels and "<figure>" not in with_labels
    study = pd.DataFrame(dict(abnormal=[1, 0]), index=pd.Index(["a", "b"], name="study")) # one label, of studies: nothing to go together
    assert "abnormal" in datasheet.summary_page(h, study, tmp_path/"c.html", n_examples=0).read_text(encoding="utf-8")
    assert "<h2>Oddities</h2>" in datasheet.summary_page(dicom.header_table([], progress=False), out=tmp_path/"d.html").read_text(encoding="utf-8") # an empty folder
    with pytest.raises(ValueError, match="a file name is wanted"): datasheet.summary_page(h)


def test_what_headers_say_is_text(tmp_path):
    "Markup in every text of a header, in the names of files and of labels."
    for i in range(3):
        t = tags(EVIL, "s" + EVIL, 5*i) | dict(SOPInstanceUID=f"x{i}", Manufacturer=EVIL, ConvolutionKernel="<b>K</b>", Modality="<I>CT")
        (tmp_path/f"<b>{i}&.dcm").write_bytes(dicom_bytes((HEAD + 1024).astype("<i2"), t, False))
    (tmp_path/"<script>.dcm").write_bytes(b"no image")
    h = dicom.header_table(sorted(tmp_path.glob("*.dcm")), n_jobs=1, progress=False)
    assert EVIL in set(h.patient) and EVIL in set(h.manufacturer)
    labels = pd.DataFrame({EVIL: [1, 0], "a$b$_{": [0, 1], "c": [0, 0]}, index=pd.Index(["<b>0&", "<b>1&"], name="image"))
    page = datasheet.summary_page(h.assign(split="<script>"), labels, tmp_path/"page.html", title=EVIL)
    found = pages_tags(page)
    assert {t for t, _ in found} <= set("html head meta title style body h1 h2 p ul li table thead tbody tr th td figure br img b".split())
    assert not [a for _, a in found if any(k.startswith("on") for k in a)] and not [a for t, a in found if t == "b" and a]
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in text and "<script" not in text and "default-src 'none'" in text
    assert sum(t == "b" for t, _ in found) == 1 # the note on the file that is no image, and none from the names


def test_page_of_real_files(samples, tmp_path):
    h = dicom.header_table(sorted(p for p in samples.rglob("*") if p.is_file()), n_jobs=1, progress=False)
    text = datasheet.summary_page(h, out=tmp_path/"real.html", n_examples=8).read_text(encoding="utf-8")
    assert text.count("<figure>") == 8 and "28 files from a gantry tilted by more than 1 degree" in text and "JPEG" in text and "JPEG 2000" in text
