"""A hook of properdocs: the search of the built pages needs neither a server nor the network."""

from pathlib import Path


def on_post_build(config):
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text()
    # A script, since a page that is open from the disk may load no other files.
    (folder / "index.js").write_text(f"{(folder / 'lunr.js').read_text()}\nconst searchIndex = {index};\n")
    (folder / "main.js").write_text(Path(config.docs_dir, "search.js").read_text())
    for name in ("lunr.js", "worker.js"):
        (folder / name).unlink()
