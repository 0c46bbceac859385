"""`prep report`, `prep verify`, `prep lint` and `prep view`."""

import click

from prep.inspect.raw import OPTIONS, raw_input
from prep.options import FOLDER, Output, as_json, echo_json, quiet
from prep.options import workers as workers_option


@click.command(short_help="Show how well packs are filled, and write their reports anew.")
@click.argument("folder", type=FOLDER)
@click.option("--no-page", is_flag=True, help="Write report.json only, no report.html.")
@quiet
@as_json
def report(folder, as_json, no_page, quiet) -> None:
    """Print the packing efficiency of FOLDER (or of its train and eval), and write report.json and report.html there.

    \b
    prep report packed
    prep report packed/train --json
    """
    from prep.inspect.facts import packed_folders
    from prep.inspect.report import refresh_reports
    from prep.pack_command import read_reports, show

    folders = packed_folders(folder)
    for part in folders:
        refresh_reports(part, page=not no_page)
    show([str(f) for f in folders], read_reports(folders), as_json=as_json, quiet=quiet)


@click.command(short_help="Check that shards are what was written, and name any damage.")
@click.argument("folder", type=FOLDER)
@click.option("--deep", is_flag=True, help="Also look into every pack: invariants, hashes, index and ledger sums.")
@click.option("--rebuild", is_flag=True, help="Write a lost packs.arrow or manifest.json anew from the shards.")
@workers_option
@quiet
@as_json
def verify(folder, deep, rebuild, workers, as_json, quiet) -> None:
    """Check that the shards in FOLDER (or in its train and eval) are what was written; exit 1 if anything is damaged.

    \b
    prep verify packed
    prep verify packed/train --deep
    """
    from prep.inspect.facts import packed_folders
    from prep.inspect.rebuild import rebuild as rebuild_folder
    from prep.inspect.verify import verify as verify_folder

    results = {}
    for part in packed_folders(folder):
        lost = rebuild_folder(part) if rebuild else []
        found = verify_folder(part, deep=deep, workers=workers)
        results[str(part)] = {"problems": found.problems, "checked": found.checked, "lost": lost}
    if as_json:
        echo_json(results)
    for name, result in results.items():
        for sentence in result["lost"]:
            click.echo(f"{name}: not recovered: {sentence}", err=True)
        for problem in result["problems"]:
            click.echo(f"Error: {problem}", err=True)
        if not quiet and not as_json and not result["problems"]:
            click.echo(f"{name}: sound ({'; '.join(result['checked'])})")
    if any(result["problems"] for result in results.values()):
        raise SystemExit(1)


@click.command(short_help="Look for what makes training wrong, in raw files or in packs.")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--tokenizer", help="Needed for raw input; for stores and shards it adds template checks.")
@workers_option
@quiet
@as_json
def lint(inputs, tokenizer, workers, as_json, quiet, **given) -> None:
    """Look for what makes training wrong in INPUTS: raw files, one document store, or one packed folder.

    Exit code 1 when there is an error; warnings and notes leave it at 0. The options from --input-format on say how raw
    files are read, as in prep encode.

    \b
    prep lint chats.jsonl --tokenizer model/
    prep lint packed
    """
    from prep.inspect.subject import lint_inputs

    results = lint_inputs(*raw_input(inputs, tokenizer, given), workers)
    if as_json:
        echo_json(results)
    else:
        from rich.console import Console

        from prep.inspect.terminal import print_lint

        for name, result in results.items():
            print_lint(Console(), name, result, errors_only=quiet)
    if any(result["errors"] for result in results.values()):
        raise SystemExit(1)


lint.params.extend(OPTIONS)


@click.command(short_help="Show packs: documents in colours, targets bold, padding dim.")
@click.argument("folder", type=FOLDER)
@click.option("--pack", "number", type=int, help="Show this pack (default: the first).")
@click.option("--doc", type=int, help="Show the pack or packs that hold this document (row of the store).")
@click.option("--random", "count", type=click.IntRange(min=1), help="Show so many packs, drawn by --seed.")
@click.option("--seed", default=0, show_default=True, help="Which packs --random draws.")
@click.option("--tokenizer", type=FOLDER, help="Folder with tokenizer.json, to show text; without it ids are shown.")
@click.option("--ids", "show_ids", is_flag=True, help="Show ids even with a tokenizer.")
@click.option("--html", "page", type=Output(file=True), help="Write a page instead.")
@quiet
@as_json
def view(folder, number, doc, count, seed, tokenizer, show_ids, page, quiet, as_json) -> None:
    """Show packs of FOLDER: each document in a colour, targets bold, padding dim, special tokens visible.

    \b
    prep view packed/train --random 3 --tokenizer model/
    prep view packed/train --doc 1234 --html doc.html --tokenizer model/
    """
    from prep.inspect.view import choose_packs, describe, open_view, print_pack, write_page

    opened = open_view(folder, tokenizer)
    packs = choose_packs(opened.dataset, number, doc, count, seed)
    if page:
        write_page(page, opened, packs, show_ids=show_ids)
    if as_json:
        echo_json([describe(opened, pack, show_ids=show_ids) for pack in packs])
    elif page and not quiet:
        click.echo(page)
    elif not page and not quiet:
        from rich.console import Console

        for pack in packs:
            print_pack(Console(highlight=False), opened, pack, show_ids=show_ids)
