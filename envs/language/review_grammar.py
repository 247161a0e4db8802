"""Short reviews from a small grammar, and the rule that says whether a review is positive.

A review is a list of words and punctuation marks. Each opinion word counts +1 or -1, and double
after an intensifier. A negator up to three words before it in the same clause turns the sign round,
and an intensifier then counts for nothing ("not very good" is -1). Some pairs of words only look
like opinions ("good morning"). A review is positive if its sum is above zero.
"""

import random
import re
from collections.abc import Iterator
from functools import cache

from tokenenv.envs.language.splits import split_of
from tokenenv.errors import check_choice

POSITIVE_ADJECTIVES = str.split(
    "good great excellent lovely friendly fresh tasty clean warm helpful wonderful perfect fine "
    "nice charming delicious superb pleasant kind amazing cosy bright"
)
NEGATIVE_ADJECTIVES = str.split(
    "bad awful terrible poor rude stale dirty cold slow dull horrible noisy bland boring broken "
    "unpleasant nasty disappointing greasy cramped weak careless"
)
POSITIVE_VERBS = {
    "enjoy": "enjoyed",
    "love": "loved",
    "like": "liked",
    "recommend": "recommended",
    "praise": "praised",
}
NEGATIVE_VERBS = {
    "hate": "hated",
    "dislike": "disliked",
    "regret": "regretted",
    "avoid": "avoided",
    "resent": "resented",
}
NEGATORS = ("not", "never", "hardly")
INTENSIFIERS = ("very", "extremely", "truly", "absolutely")
DECOYS = (
    "good morning",
    "great deal",
    "great hall",
    "fine print",
    "warm evening",
    "fresh air",
    "bad weather",
    "cold drinks",
    "slow train",
    "weak signal",
)
PLACES = str.split("hotel restaurant cafe bar bakery museum inn pub bistro diner hostel canteen")
DISHES = str.split(
    "soup bread coffee tea pasta fish cake salad pizza cheese wine curry rice pie juice breakfast "
    "dinner lunch"
)
THINGS = str.split(
    "room bed view music garden terrace lobby service staff waiter menu bathroom kitchen guide "
    "shop tour"
)
PEOPLE = str.split("sister brother friend mother father boss neighbour uncle aunt cousin")
TIMES = str.split("yesterday today again once twice recently")
DAYS = str.split("monday tuesday friday saturday sunday")
SIGHTS = str.split("station river market park castle harbour bridge church lake square")
OPENINGS = {"train": 2000, "test": 512}
"""The number of prompts of each split."""
MIN_OPENING, MAX_OPENING = 4, 10
"""The length of a prompt in words and marks."""
CLAUSE_ENDS = (".", ",", "!", "and", "but")

POLARITY = dict.fromkeys(
    [*POSITIVE_ADJECTIVES, *POSITIVE_VERBS, *POSITIVE_VERBS.values()], 1
) | dict.fromkeys([*NEGATIVE_ADJECTIVES, *NEGATIVE_VERBS, *NEGATIVE_VERBS.values()], -1)
_PAIRS = {tuple(pair.split()) for pair in DECOYS}
_TOKEN = re.compile(r"[a-z]+|[.,!]")


def opinions(words: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the index and the signed weight of each word that gives an opinion."""
    for i, word in enumerate(words):
        if word not in POLARITY or (word, "".join(words[i + 1 : i + 2])) in _PAIRS:
            continue
        # The last three words before it, from the last end of a clause among them on.
        clause = words[:i][-3:]
        while any(mark in clause for mark in CLAUSE_ENDS):
            clause = clause[1:]
        negations = sum(before in NEGATORS for before in clause)
        strength = 2 if not negations and clause[-1:] and clause[-1] in INTENSIFIERS else 1
        yield i, POLARITY[word] * (-1) ** negations * strength


def split_words(text: str) -> list[str]:
    """Return the words and marks of a text, in lower case; anything else is dropped."""
    return _TOKEN.findall(text.lower())


def sentiment(text: str) -> int:
    """Return the sum of the signed opinions of a text; 0 where there are none or they balance."""
    return sum(weight for _, weight in opinions(split_words(text)))


def is_positive(text: str) -> bool:
    """Whether the opinions of a text sum to more than zero; a balanced text is not positive."""
    return sentiment(text) > 0


def review(rng: random.Random, leaning: float | None = None) -> list[str]:
    """Draw one review. `leaning` is the share of opinions in favour; by default it is drawn so that
    about half of all reviews are positive."""
    if leaning is None:
        leaning = rng.choice((0.15, 0.15, 0.65, 0.65, 0.9, 0.9))
    sentences = [_opening(rng)] if rng.random() < 0.75 else []
    for _ in range(rng.choice((1, 2, 2, 3))):
        sentences.append(_opinion_sentence(rng, leaning))
        if rng.random() < 0.25:
            sentences.append(_neutral(rng))
    if rng.random() < 0.35:
        sentences.append(_verdict(rng, leaning))
    return [word for sentence in sentences for word in sentence.split()]


def _opening(rng: random.Random) -> str:
    place, person, time = rng.choice(PLACES), rng.choice(PEOPLE), rng.choice(TIMES)
    return rng.choice(
        (
            f"we visited this {place} {time} .",
            f"my {person} and i went to the {place} on {rng.choice(DAYS)} .",
            f"i came to this {place} with my {person} .",
            f"this {place} is near the {rng.choice(SIGHTS)} .",
            f"it was a warm evening when we found the {place} .",
            f"{time} my {person} ordered the {rng.choice(DISHES)} here .",
            f"the slow train brought us to this {place} .",
            f"we stayed at the {place} for a night in bad weather .",
        )
    )


def _neutral(rng: random.Random) -> str:
    dish, thing, person = rng.choice(DISHES), rng.choice(THINGS), rng.choice(PEOPLE)
    return rng.choice(
        (
            f"the {dish} came with {rng.choice(DISHES)} .",
            f"a waiter said good morning to my {person} .",
            f"we had cold drinks in the {rng.choice(('garden', 'lobby', 'shop'))} .",
            f"the {thing} is next to the great hall .",
            "a great deal of the menu is in fine print .",
            f"my {person} went out for fresh air .",
            f"there is a weak signal in the {thing} .",
            f"we walked from the {rng.choice(SIGHTS)} .",
            f"the {thing} was on the second floor .",
        )
    )


def _opinion_sentence(rng: random.Random, leaning: float) -> str:
    kind = rng.randrange(6)
    item, other = rng.choice(DISHES + THINGS), rng.choice(DISHES + THINGS)
    first, second = _sign(rng, leaning), _sign(rng, leaning)
    if kind <= 1:
        return f"the {item} was {_phrase(rng, first)} ."
    if kind == 2:
        link = "and" if first == second else "but"
        return (
            f"the {item} was {_phrase(rng, first)} {link} the {other} was {_phrase(rng, second)} ."
        )
    if kind == 3:
        return f"{rng.choice(('we', 'i'))} {_verb_phrase(rng, first)} the {item} ."
    if kind == 4:
        return f"{rng.choice(('we', 'i'))} found the {item} {_phrase(rng, first)} ."
    who = rng.choice(PEOPLE)
    return f"my {who} said the {item} was {_phrase(rng, first)} , {_phrase(rng, second)} ."


def _verdict(rng: random.Random, leaning: float) -> str:
    sign = _sign(rng, leaning)
    verb = "recommend" if sign > 0 else "avoid"
    return rng.choice(
        (f"i would {verb} this {rng.choice(PLACES)} !", f"overall it was {_phrase(rng, sign)} !")
    )


def _sign(rng: random.Random, leaning: float) -> int:
    return 1 if rng.random() < leaning else -1


def _phrase(rng: random.Random, sign: int) -> str:
    negated = rng.random() < 0.3
    adjective = rng.choice(POSITIVE_ADJECTIVES if (sign > 0) != negated else NEGATIVE_ADJECTIVES)
    intensifier = f"{rng.choice(INTENSIFIERS)} " if rng.random() < 0.3 else ""
    negator = f"{rng.choice(NEGATORS)} " if negated else ""
    return negator + intensifier + adjective


def _verb_phrase(rng: random.Random, sign: int) -> str:
    if rng.random() < 0.3:
        return f"did not {rng.choice(list(NEGATIVE_VERBS if sign > 0 else POSITIVE_VERBS))}"
    return rng.choice(list((POSITIVE_VERBS if sign > 0 else NEGATIVE_VERBS).values()))


def vocabulary() -> list[str]:
    """Return every word and mark that a review may hold, sorted."""
    rng = random.Random(0)
    seen = {word for _ in range(20_000) for word in review(rng)}
    return sorted(seen | set(POLARITY) | set(NEGATORS) | set(INTENSIFIERS) | set(CLAUSE_ENDS))


@cache
def openings(split: str) -> tuple[str, ...]:
    """Return the prompts of a split: beginnings of reviews, all different, 4 to 10 words long, and
    without an opinion."""
    check_choice("split", split, OPENINGS)
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < OPENINGS[split]:
        words = review(rng)
        length = rng.randint(MIN_OPENING, MAX_OPENING)
        text = " ".join(words[:length])
        if len(words) > length and split_of(text) == split and not list(opinions(words[:length])):
            found[text] = None
    return tuple(found)
