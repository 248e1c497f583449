"""Detokenisers: exact strings, equal to what the published functions give."""

from collections.abc import Callable

import pytest

from llm.evals import detokenise

_EXAMPLES: list[tuple[Callable[[str], str], str, str]] = [
    (detokenise.wikitext, " = Robert <unk> = \n", " = Robert <unk> =\n"),
    (detokenise.wikitext, " = = = Plot = = = \n", " === Plot ===\n"),
    (
        detokenise.wikitext,
        ' Homarus , the lobster , weighs 5 @-@ 6 kg ( 11 lb ) and costs $ 1 @,@ 000 @.@ 50 ; it \'s " blue " . \n',
        ' Homarus, the lobster, weighs 5-6 kg (11 lb) and costs $ 1,000.50; it\'s "blue".\n',
    ),
    (
        detokenise.wikitext,  # the apostrophe of "boys '" finds the wrong partner, in the published function too
        "the boys ' club is at 5 ° N of [ x ] { y } ' z ' : yes ! no ? \n",
        "the boys'club is at 5°N of [x] {y}' z ': yes! no?\n",
    ),
    (detokenise.wikitext, "A N B", "A 1 B"),
    (detokenise.wikitext, "", ""),
    (
        detokenise.penn_treebank,
        "mr. <unk> 's profits rose N N to $ N from N N N N a share",
        "mr. ?'s profits rose 1 1 to $1 from 1 1 1 1 a share",
    ),
    (detokenise.penn_treebank, "the companies ' do n't 1\\/2 # N", "the companies' don't 1/2 # N"),
    (detokenise.lm1b, 'He said , " I do n\'t know . "', 'He said, "I do n\'t know."'),
    (
        detokenise.lm1b,
        "Is it 's ( new ) [ sic ] ? Yes ! See http : / / a.b / c .",
        "Is it's (new) [sic]? Yes! See http://a.b/c.",
    ),
    (
        detokenise.lm1b,
        "It cost $ 5 or £ 6 ; he left : ' now ' and / or",
        "It cost $5 or £6; he left: 'now' and/or",
    ),
    (detokenise.lm1b, "What ?", "What?"),
    (detokenise.lm1b, "Stop !", "Stop!"),
    (detokenise.lambada, " “Hi,” he said ", '\n"Hi," he said'),
    (
        detokenise.scientific_papers,
        'we show that N @xcite , ( see fig . ) is " good " . the end .',
        'we show that 1 @xcite, (see fig.) is "good". the end.',
    ),
    (detokenise.unchanged, " as , it is \n", " as , it is \n"),
]


@pytest.mark.parametrize(("function", "tokenised", "text"), _EXAMPLES)
def test_tokenised_rows_become_the_text_of_the_published_evaluation(
    function: Callable[[str], str], tokenised: str, text: str
) -> None:
    assert function(tokenised) == text
