"""The policy grammar: what each text means, and where an error points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub import grammar
from kernelhub.errors import PolicyError
from kernelhub.grammar import Choice, Rule

OPS = ("fused_gemv", "fused_moe_gemv", "fused_mul_add", "rotary_embedding")
BACKENDS = ("cuda", "musa", "reference", "triton")


def choice(*names: str) -> Choice:
    """`choice("cuda", "-musa")`: the same in code, where names always has a name."""
    chosen = tuple(name for name in names if not name.startswith("-"))
    return Choice(chosen, frozenset(name[1:] for name in names if name.startswith("-")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reference", choice("reference")),
        ("auto", choice("auto")),
        ("cuda,auto", choice("cuda", "auto")),
        ("auto,reference", choice("auto", "reference")),
        ("musa,cuda", choice("musa", "cuda")),
        ("-musa", choice("auto", "-musa")),
        ("-musa,-cuda", choice("auto", "-musa", "-cuda")),
        ("cuda,-musa", choice("cuda", "-musa")),
        ("cuda,-musa,auto", choice("cuda", "auto", "-musa")),
        ("  cuda ,\tauto ", choice("cuda", "auto")),
        ("- musa", choice("auto", "-musa")),
        ("_x.y-2", choice("_x.y-2")),
        ("autopilot", choice("autopilot")),
    ],
)
def test_choice(text: str, expected: Choice) -> None:
    rules = grammar.parse(text)
    assert [(rule.glob, rule.choice) for rule in rules.rules] == [("*", expected)]
    assert rules.text == text
    assert rules.match("any_op") == expected


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        ("reference", True),
        ("auto", False),
        ("cuda,auto", False),
        ("cuda,musa", False),
        ("-musa", False),
        ("cuda,-musa", False),
    ],
)
def test_a_single_name_is_a_command(text: str, forced: bool) -> None:
    assert grammar.parse(text).rules[0].choice.forced is forced


def test_rules_and_their_columns() -> None:
    text = "fused_gemv = reference; *moe*=musa , -cuda ;auto"
    assert grammar.parse(text).rules == (
        Rule("fused_gemv", choice("reference"), 0, (("reference", 13),)),
        Rule("*moe*", choice("musa", "-cuda"), 24, (("musa", 30), ("cuda", 37))),
        Rule("*", choice("auto"), 44),
    )
    for rule in grammar.parse(text).rules:
        assert text[rule.column :].startswith(rule.glob) or rule.glob == "*"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 0, "a rule is empty"),
        ("   ", 0, "a rule is empty"),
        ("cuda;", 5, "a rule is empty"),
        (";cuda", 0, "a rule is empty"),
        ("fused_gemv=cuda; ;auto", 16, "a rule is empty"),
        (",", 0, "name is missing"),
        ("cuda,", 5, "name is missing"),
        ("cuda,,musa", 5, "name is missing"),
        ("fused_gemv=", 11, "name is missing"),
        ("fused_gemv= ;cuda", 11, "name is missing"),
        ("=cuda", 0, "no op before '='"),
        (" = cuda", 0, "no op before '='"),
        ("-", 1, "no name after '-'"),
        ("cuda,- ,musa", 6, "no name after '-'"),
        ("--musa", 1, "'-' cannot stand here in the name of a backend"),
        ("cu da", 2, "' ' cannot stand here"),
        ("cuda\nmusa", 4, "'\\n' cannot stand here"),
        ("cuda:0", 4, "':' cannot stand here"),
        ("2cuda", 0, "'2' cannot stand here"),
        ("cüda", 1, "'ü' cannot stand here"),
        ("cuda,*", 5, "'*' cannot stand here"),
        ("fused gemv=cuda", 5, "' ' cannot stand here in the name of an op"),
        ("fused-gemv=cuda", 5, "'-' cannot stand here in the name of an op"),
        ("fused_gemv,x=cuda", 10, "',' cannot stand here in the name of an op"),
        ("[gemv=cuda", 0, "'[' cannot stand here"),
        ("a[]=cuda", 1, "'[' cannot stand here"),
        ("a[-z]=cuda", 1, "'[' cannot stand here"),
        ("a]=cuda", 1, "']' cannot stand here"),
        ("a[x-bz-a]=cuda", 2, "'x-b' is an empty range"),
        ("cuda,cuda", 5, "'cuda' twice"),
        ("-cuda,musa,- cuda", 11, "'cuda' twice"),
        ("auto,cuda,auto", 10, "'auto' twice"),
        ("cuda,-cuda", 5, "'cuda' is both chosen and excluded"),
        ("-cuda,auto,cuda", 11, "'cuda' is both chosen and excluded"),
        ("cuda, -auto", 6, "'auto' cannot be excluded"),
        ("fused_gemv=cuda=musa", 15, "a second '=' in one rule; rules are separated by ';'"),
        ("cuda;musa", 5, "a second rule for every op"),
        ("*=cuda; musa", 8, "a second rule for every op"),
        ("f*=cuda;g*=musa; f*=musa", 17, "a second rule for 'f*'"),
    ],
)
def test_parse_errors_point_at_the_column(text: str, column: int, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        grammar.parse(text)
    assert message in str(caught.value)
    assert (caught.value.column, caught.value.text) == (column, text)
    assert f"column {column + 1}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "op", "expected"),
    [
        ("fused_gemv=cuda", "fused_gemv", "cuda"),
        ("fused_gemv=cuda", "fused_moe_gemv", None),
        ("fused_gemv=cuda", "Fused_gemv", None),
        ("fused_gemv=cuda;musa", "fused_moe_gemv", "musa"),
        ("musa;fused_gemv=cuda", "fused_gemv", "cuda"),
        ("fused_*=cuda;fused_m*=musa", "fused_moe_gemv", "musa"),
        ("fused_m*=musa;fused_*=cuda", "fused_moe_gemv", "musa"),
        ("fused_m*=musa;fused_*=cuda", "fused_gemv", "cuda"),
        ("fused_gem?*=musa;fused_gemv=cuda", "fused_gemv", "cuda"),
        ("fused_gemv*=musa;fused_gemv=cuda", "fused_gemv", "cuda"),
        ("??????????=musa;f*=cuda", "fused_gemv", "cuda"),
        ("[f-g]used_gemv=musa;fused_ge*=cuda", "fused_gemv", "musa"),
        ("[!a-e]*=cuda", "fused_gemv", "cuda"),
        ("[!a-f]*=cuda", "fused_gemv", None),
        ("*[rv]=cuda;*moe*=musa", "fused_gemv", "cuda"),
    ],
)
def test_the_most_specific_rule_wins(text: str, op: str, expected: str | None) -> None:
    found = grammar.parse(text).match(op)
    assert found == (None if expected is None else choice(expected))


@pytest.mark.parametrize(
    ("text", "op", "column"),
    [
        ("fuse*=cuda; *gemv=musa", "fused_moe_gemv", 12),
        ("reference;fuse*=cuda; *gemv=musa", "fused_gemv", 22),
        ("*_mul_*=cuda; f?sed*=x; fused*=musa", "fused_mul_add", 24),
        ("f[u-v]sed_mul_add=cuda; fused_mul_ad?=musa;f*=x", "fused_mul_add", 24),
        ("a=x;fused_gem?=cuda;b=x; ?used_gemv=musa; fused_ge[m]v=musa", "fused_gemv", 25),
    ],
)
def test_a_tie_points_at_the_later_rule(text: str, op: str, column: int) -> None:
    rules = grammar.parse(text)
    with pytest.raises(PolicyError, match="equally well; name the op") as caught:
        rules.match(op)
    assert caught.value.column == column
    assert rules.match("rotary_embedding") in (None, choice("reference"))


@pytest.mark.parametrize(
    "text",
    [
        "reference",
        "cuda,auto",
        "-musa,-triton",
        "fused_gemv=reference;*moe*=musa,reference",
        "fused_*=cuda;rotary_embedding=-cuda;auto",
    ],
)
def test_validate_accepts(text: str) -> None:
    grammar.parse(text).validate(iter(OPS), iter(BACKENDS))


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("cude", 0, "no backend is named 'cude'; did you mean 'cuda'? known: auto, cuda, musa"),
        ("auto, -mussa", 6, "no backend is named 'mussa'; did you mean 'musa'?"),
        ("atuo", 0, "did you mean 'auto'?"),
        (
            "fused_gemv=cuda;fused_gem=musa",
            16,
            "no op matches 'fused_gem'; did you mean 'fused_gemv'?",
        ),
        ("rotary*=cuda ; *sampling* = musa", 15, "no op matches '*sampling*'; "),
        ("fused_gemv=cuda;*=musa,rocm", 23, "no backend is named 'rocm'; "),
        ("fuse*=cuda; *gemv=musa", 12, "'fuse*' and '*gemv' match op 'fused_gemv' equally well"),
    ],
)
def test_validate_rejects(text: str, column: int, message: str) -> None:
    rules = grammar.parse(text)
    with pytest.raises(PolicyError) as caught:
        rules.validate(iter(OPS), iter(BACKENDS))
    assert message in str(caught.value)
    assert caught.value.column == column


def test_an_exact_name_settles_a_tie() -> None:
    text = "fuse*=cuda;*gemv=musa;*fused_gemv*=musa;fused_gemv=cuda;fused_moe_gemv=musa"
    grammar.parse(text).validate(OPS, BACKENDS)


def test_a_bare_rule_needs_no_op() -> None:
    grammar.parse("reference").validate((), BACKENDS)


@pytest.mark.parametrize("text", ["warn", "error", "quiet", " quiet\n"])
def test_fallback(text: str) -> None:
    assert grammar.parse_fallback(text) == text.strip()


@pytest.mark.parametrize(
    ("text", "column", "hint"),
    [
        ("quite", 0, "did you mean 'quiet'?"),
        ("", 0, "known: error, quiet, warn"),
        (" WARN", 1, "no fallback is named 'WARN'"),
        ("warn,error", 0, "named 'warn,error'"),
    ],
)
def test_fallback_errors(text: str, column: int, hint: str) -> None:
    with pytest.raises(PolicyError) as caught:
        grammar.parse_fallback(text)
    assert hint in str(caught.value)
    assert (caught.value.column, caught.value.text) == (column, text)


NOISE = st.one_of(st.text(), st.text(alphabet="ab_-,;=*?[]!.0 auto\n"))


@given(NOISE)
def test_any_text_parses_or_raises_a_policy_error(text: str) -> None:
    try:
        rules = grammar.parse(text)
        rules.match("auto_ab")
        rules.validate(OPS, BACKENDS)
    except PolicyError as error:
        column = error.column
    else:
        assert all(rule.choice.names for rule in rules.rules)
        column = 0
    assert column in range(len(text) + 1)


SPACE = st.text(alphabet=" \t", max_size=2)
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,5}", fullmatch=True).filter(lambda n: n != "auto")
PIECE = st.sampled_from(["*", "?", "[a-c]", "[!xyz]", "gemv", "_", "7"])
GLOB = st.lists(PIECE, min_size=1, max_size=4).map("".join).filter(lambda g: g != "*")


@st.composite
def rule_texts(draw: st.DrawFn) -> tuple[str, list[tuple[str, Choice]]]:
    """Well-formed text with stray spaces, and what it must mean."""
    expected, parts = [], []
    for glob in draw(st.lists(st.one_of(st.just("*"), GLOB), min_size=1, max_size=4, unique=True)):
        backends = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
        words = [draw(st.sampled_from(["", "-"])) + name for name in backends]
        if draw(st.booleans()):
            words.insert(draw(st.integers(0, len(words))), "auto")
        meant = choice(*words)
        expected.append((glob, meant if meant.names else Choice(("auto",), meant.excluded)))
        spaced = ",".join(draw(SPACE) + word + draw(SPACE) for word in words)
        bare = glob == "*" and draw(st.booleans())
        parts.append(spaced if bare else f"{draw(SPACE)}{glob}{draw(SPACE)}={spaced}")
    return ";".join(parts), expected


@given(rule_texts())
def test_generated_rules_come_back(made: tuple[str, list[tuple[str, Choice]]]) -> None:
    text, expected = made
    rules = grammar.parse(text).rules
    assert [(rule.glob, rule.choice) for rule in rules] == expected
    for rule in rules:
        for name, column in rule.name_columns:
            assert text[column:].lstrip("- \t").startswith(name)
