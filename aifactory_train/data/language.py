"""Which language a text is written in: by its script, its small words and its letters. Standard library only.

Small words (articles, prepositions, auxiliaries) make up a third to a half of running text, and a list of twenty is
enough to tell European languages apart from about a line of text on (Grefenstette 1995, "Comparing two language
identification schemes", finds small words as good as trigrams from fifteen words on).

What is no language is left out first (:func:`prose`): markup, identifiers, tags, paths and addresses hold ``i``, ``an``
and ``de`` that no Swede, Irishman or Frenchman wrote.

Limits, which reports repeat: text shorter than a dozen words is often ``und`` (undetermined), as are tables, lists of
names and code; a row gets one language, so mixed rows count for the larger part; Danish and Norwegian, Croatian,
Bosnian and Serbian in Latin script, and Galician and Portuguese are close enough to be taken for one another in short
texts; languages that are not in :data:`KNOWN` are ``und`` or taken for a neighbour.
"""

from __future__ import annotations

import collections
import math
import re
import unicodedata
from collections.abc import Sequence

#: Small words by language (BCP 47). Kept to forms that are frequent in any kind of prose.
_WORDS = {
    "en": "the of and to in is that it for was with as on are be this by not have from which or an at but they were "
    "has their",
    "de": "der die und das den von zu mit ist auf für nicht ein eine im dem des sich auch werden wird sind oder bei "
    "nach aus einer",
    "fr": "le la les des et de du un une est que dans pour qui par sur pas au avec sont ce il plus ou se aux cette "
    "ses être",
    "es": "el la los las de y que en un una es por con para del se no al lo como su más sus o son fue entre sin este "
    "sobre",
    "it": "il la di e che un una in per con non del della è sono gli dei nel si le da come alla più ogni delle al "
    "anche questo",
    "pt": "o os as de e que do da em um uma para com não dos das no na por se mais ao como foi são ou seu sua pelo "
    "pela é",
    "nl": "de het een van en in is dat op te zijn voor met niet aan er om ook als bij door naar uit wordt of maar "
    "deze heeft",
    "da": "og i at det er en den til på som de med for af ikke der et har var fra eller også ved blev kan skal være "
    "hvor efter",
    "nb": "og i å det er en den til på som de med for av ikke et har var fra eller også ved ble kan skal være hvor "
    "etter sin",
    "nn": "og i å det er ein den til på som dei med for av ikkje eit har var frå eller også ved vart kan skal vere "
    "der etter sin",
    "sv": "och i att det är en den till på som de med för av inte ett har var från eller också vid blev kan ska vara "
    "där efter sin",
    "is": "og í að er á sem það til um við fyrir með ekki en var af hann frá eða eru hefur þessi hafa vera skal sé "
    "þess öllum eigi",
    "fo": "og í at er á sum tað til um við fyri ikki men var av hann frá ella eru hevur hesin hava vera skal tey øll "
    "rætt teimum",
    "fi": "ja on ei se että hän oli joka mutta myös kun ovat tai niin sekä kuin ole voi jos tämä sen ne mukaan hänen "
    "olla kaikki jokaisella",
    "et": "ja on ei see et ta oli mis aga ka kui või siis nii ning kes seda selle tema peab õigus igal oma võib mitte "
    "olla",
    "lv": "un ir ka no uz ar par kas lai tas nav bet vai arī tiek kā pēc pie tikai viņa būt jābūt kuru šis tiesības "
    "katram",
    "lt": "ir yra kad su iš į ne tai bei apie kaip po už kuris buvo arba jo jos turi teisę kiekvienas būti taip dėl "
    "per nuo ar",
    "pl": "i w na z do się nie jest że o to od za przez dla jako oraz jak po które być ma są lub także ale tego jego "
    "każdy",
    "cs": "a v na je se že s z do o k pro ve si by jako jeho které nebo jsou být ale po při tak má každý to které není",
    "sk": "a v na je sa že s z do o k pre vo si by ako jeho ktoré alebo sú byť ale po pri tak má každý to ktorý nie",
    "sl": "in v na je se da za z s ki so pri kot ne po od ali tudi ima pa bi do iz vsakdo mora njegove biti pravico",
    "hr": "i u na je se da za s o su od koji kao što ne iz po ili bi do svoje prema može sa te ima bez njegova svatko "
    "pravo",
    "hu": "a az és hogy nem is egy ez van volt vagy de mint csak minden meg azt ha ki el kell által joga való között "
    "szemben",
    "ro": "și în de la a cu pe nu un o este care din să pentru sau mai ce că prin ca fi sunt are al ale orice dreptul "
    "către",
    "mt": "il ta li u fil għal mhux dan din hija huwa minn ma jew bħal kull dwar biex l-jedd għandu tal kien hu meta "
    "bejn wieħed",
    "ga": "an na agus i ar is a le go do ag de gur nach bhí sé leis chun faoin gach duine aon nó atá bheith sin ina",
    "sq": "të dhe e në i për me që nuk një është se nga si ka do më ose ky janë kjo tij por çdo gjithkush drejtë",
    "tr": "ve bir bu için ile da de olarak olan her veya gibi çok daha kadar değil ancak sonra var herkes hakkı "
    "olduğu ki ne",
    "ca": "el la els les de i que en un una és per amb del no als al com dels més seva seu ha o tota tothom dret té "
    "sense",
    "gl": "o a os as de e que en un unha é por con para do da non dos das no na ao como máis súa seu ou toda dereito "
    "ten",
    "eu": "eta da ez du bat dira izan duen dute ere baina edo hau zen eskubidea guztiek bere orok beste dela ditu "
    "izango",
    "cy": "y yn a r o i ac ar ei mae am gan hawl gyda bod neu hyn wedi fod pawb ni un eu fel oedd sydd",
    "bg": "и на в за от се да с не е по като са или при това към че до който има бъде всеки право неговата",
    "mk": "и на во за од се да со не е по како што се или при ова кон дека до кој има биде секој право неговата",
    "sr": "и у на је се да за са о су од који као што не из по или би до своје према може сваки право њега",
    "ru": "и в на не что с по как это он из за для от к у о или его так же быть каждый право человек имеет при был их",
    "uk": "і в на не що з та до як у це за про його або від є для по який бути кожна право людина має при були їх",
    "be": "і ў на не што з да як у гэта за яго або ад ёсць для па які быць кожны права чалавек мае пры былі іх",
}
#: Letters that speak for a language when they occur; the number is how much each occurrence counts, in small words.
_LETTERS = {
    "is": "þð",
    "fo": "ð",
    "hu": "őű",
    "cs": "řěů",
    "sk": "ľĺŕ",
    "pl": "łąęśź",
    "ro": "șțăşţ",
    "lv": "ģķļņ",
    "lt": "ėųį",
    "mt": "ħġċ",
    "tr": "ğı",
    "de": "ß",
    "es": "ñ¿¡",
    "pt": "ãõ",
    "et": "õ",
    "sq": "ë",
    "ca": "·",
    "uk": "їєґ",
    "be": "ўё",
    "ru": "ыэё",
    "mk": "ѓќѕ",
    "sr": "ђћ",
    "bg": "ъщ",
}
#: First word of the Unicode name of letters -> language, for scripts that one language of ours is written in.
_SCRIPTS = {
    "GREEK": "el",
    "HEBREW": "he",
    "ARABIC": "ar",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
    "THAI": "th",
    "DEVANAGARI": "hi",
}
KNOWN = (*_WORDS, *dict.fromkeys(_SCRIPTS.values()))
#: Languages written without spaces: tokens per word says nothing there.
UNSPACED = frozenset({"zh", "ja", "th"})
LIMITS = (
    "rows of fewer than a dozen words, tables and code are 'und'; da/nb, hr/sr and gl/pt are confused in short rows"
)

_TABLE: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
for _language, _list in _WORDS.items():
    for _word in set(_list.split()):
        _TABLE[_word].append((_language, 0.0))
for _word, _entries in _TABLE.items():
    # A word that few languages have says more (the inverse document frequency of information retrieval).
    _TABLE[_word] = [(name, math.log(1 + len(_WORDS) / len(_entries))) for name, _ in _entries]
_BY_LETTER: dict[str, list[str]] = collections.defaultdict(list)
for _language, _list in _LETTERS.items():
    for _letter in _list:
        _BY_LETTER[_letter].append(_language)
_CYRILLIC = frozenset(name for name, words in _WORDS.items() if re.search("[а-я]", words))
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)?")
#: Characters that are looked at; more changes nothing.
MOST = 2_000
_LEAST_SHARE = 0.12  # of the words are small words, in prose of every language above
_LEAST_HITS = 2  # different ones, and not symbols alone: a formula repeats its ``i``

_MARKUP = re.compile(r"<[^<>\n]{0,200}>|&(?:[A-Za-z]{2,8}|#\d{1,7});")
#: What stands between blanks; scripts without blanks (Thai, Chinese, Japanese) end it, lest one identifier take the
#: sentence along.
_RUN = re.compile(r"([^\s\u0e00-\u0eff\u2e80-\uffff]+)")
#: Marks of an identifier, a tag (``highway=bus_stop``), a path, an address, a call, a unit or a part number.
_CODE = re.compile(
    r"[_=<>{}\\|@#$^~]|::|^/|/.*/|[^\W\d_][.:][a-zß-öø-ÿ]|[a-zß-öø-ÿ][A-Z]|[A-Za-z]\d|\d[A-Za-z]|[A-Za-z]\("
)


class _Kept(dict[str, str]):
    """A run as :func:`prose` keeps it: as it is, or empty. Runs repeat, so they are remembered."""

    def __missing__(self, run: str) -> str:
        kept = "" if _CODE.search(run) else run
        if len(run) <= 40:
            if len(self) > 1 << 16:
                self.clear()
            self[run] = kept
        return kept


_kept = _Kept().__getitem__


def prose(text: str) -> str:
    """``text`` without what belongs to no language: markup, entities, identifiers, tags, paths, addresses and part
    numbers.
    """
    pieces = _RUN.split(_MARKUP.sub(" ", text))  # what stands between runs, and the runs
    pieces[1::2] = map(_kept, pieces[1::2])
    return "".join(pieces)


def detect(text: str) -> str:
    """BCP 47 code of the language of the prose in ``text``, or ``und``."""
    text = prose(text[:MOST]).casefold()
    words = _WORD.findall(text)
    letters: collections.Counter[str] = collections.Counter()
    script = "LATIN" if words else ""
    if not text.isascii():  # ASCII has one script, and no letter of one language
        letters.update(text)
        script = _script(letters)
    if script == "":
        return "und"
    if script not in ("LATIN", "CYRILLIC"):
        return _SCRIPTS.get(script, "und")
    score: dict[str, float] = collections.defaultdict(float)
    hits: dict[str, int] = collections.defaultdict(int)
    different: dict[str, int] = collections.defaultdict(int)
    longer: set[str] = set()
    counts = collections.Counter(words)
    for word in filter(_TABLE.__contains__, counts):
        count = counts[word]
        for name, weight in _TABLE[word]:
            score[name] += weight * count
            hits[name] += count
            different[name] += 1
            if len(word) > 1:
                longer.add(name)
    for letter, count in letters.items():
        for name in _BY_LETTER.get(letter, ()):
            score[name] += min(count, 10) * 0.7
    allowed = [name for name in score if (name in _CYRILLIC) == (script == "CYRILLIC")]
    enough = [
        n for n in allowed if n in longer and different[n] >= _LEAST_HITS and hits[n] >= _LEAST_SHARE * len(words)
    ]
    return max(enough, key=lambda n: (score[n], n)) if enough else "und"


def _script(letters: collections.Counter[str]) -> str:
    """First word of the Unicode name of most letters; empty without letters. Kana among Chinese characters mean
    Japanese.
    """
    found: collections.Counter[str] = collections.Counter()
    for letter, count in letters.items():
        if letter.isalpha():
            found["LATIN" if letter < "ɐ" else unicodedata.name(letter, "?").partition(" ")[0]] += count
    if not found:
        return ""
    if found["HIRAGANA"] + found["KATAKANA"] > 0.1 * found["CJK"] > 0:
        return "HIRAGANA"
    return found.most_common(1)[0][0]


def shares(texts: Sequence[str], stated: Sequence[str | None] | None = None) -> dict[str, float]:
    """Share of the texts by language (the one that is ``stated``, else detected), largest first; empty without
    texts.
    """
    said = stated or [None] * len(texts)
    found = collections.Counter(name or detect(text) for text, name in zip(texts, said, strict=True))
    total = sum(found.values())
    return {name: round(count / total, 4) for name, count in found.most_common()}
