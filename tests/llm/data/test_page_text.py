from llm.data.page_text import paragraphs

LONG = "A sentence that is long enough to be kept as a paragraph of text."


def test_block_tags_part_paragraphs_and_inline_tags_do_not() -> None:
    marked = LONG.replace("long", "<b>long</b>").replace(" as", "\n  as")
    page = f"<html><body><h1>{LONG}</h1><p>{marked}<div>x{LONG}</body>"
    assert paragraphs(page) == [LONG, LONG, f"x{LONG}"]


def test_scripts_navigation_and_short_pieces_are_dropped() -> None:
    page = (
        f"<head><title>{LONG}</title></head><nav>{LONG}<ul><li>{LONG}</ul></nav><!-- {LONG} <p> -->"
        f"<script>if (a < b) {{ '<p>{LONG}</p>' }}</script><STYLE>{LONG}</STYLE><p>short</p><p>{LONG}</p><footer>{LONG}"
    )
    assert paragraphs(page) == [LONG]


def test_pre_keeps_its_lines_and_entities_are_resolved_once() -> None:
    page = f"<pre class='a > b'>\n  if a &lt; b:\n      <i>print</i>(&quot;&amp;lt;&quot;)  # {LONG}\n</pre>"
    assert paragraphs(page) == [f'  if a < b:\n      print("&lt;")  # {LONG}']


def test_stray_angle_brackets_are_text() -> None:
    assert paragraphs(f"<p>{LONG} a < b and c > d</p>") == [f"{LONG} a < b and c > d"]
