"""The cells of a script in percent format, as a notebook has them."""


def cells_of(script: str) -> list[tuple[str, str]]:
    """(markdown or code, text) of each cell after the script's head."""
    cells = []
    for part in script.split("\n# %%")[1:]:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().split("\n")]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", text.strip()))
    return cells
