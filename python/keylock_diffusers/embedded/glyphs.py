"""The vocabulary of the embedded base model: which glyphs it draws and what each is called.

Captions are shortened from the English names of the Unicode CLDR annotations. A glyph of group
``cat`` says "cat" in its caption, so that a concept's placeholder can stand in the word's place.
"""

from __future__ import annotations

from dataclasses import dataclass

_TABLE = {
    "cat": """
        1f431 cat; 1f63a grinning cat; 1f639 cat with tears of joy; 1f63b cat with heart eyes; 1f63c smirking cat
        1f63d kissing cat; 1f640 scared cat; 1f63f crying cat; 1f63e pouting cat""",
    "animal": """
        1f436 dog; 1f43a wolf; 1f98a fox; 1f99d raccoon; 1f981 lion; 1f42f tiger; 1f434 horse; 1f984 unicorn
        1f42e cow; 1f437 pig; 1f42d mouse; 1f439 hamster; 1f430 rabbit; 1f43b bear; 1f428 koala; 1f43c panda
        1f435 monkey; 1f414 chicken; 1f424 chick; 1f427 penguin; 1f986 duck; 1f989 owl; 1f438 frog; 1f422 turtle
        1f40d snake; 1f432 dragon; 1f433 whale; 1f42c dolphin; 1f420 fish; 1f988 shark; 1f419 octopus; 1f980 crab
        1f40c snail; 1f98b butterfly; 1f41d bee; 1f41e ladybug; 1f418 elephant; 1f992 giraffe; 1f994 hedgehog
        1f411 sheep; 1f993 zebra; 1f9a9 flamingo; 1f99c parrot; 1f996 dinosaur""",
    "face": """
        1f600 grinning face; 1f602 face with tears of joy; 1f609 winking face; 1f60d face with heart eyes
        1f618 kissing face; 1f61b face with tongue; 1f914 thinking face; 1f634 sleeping face
        1f637 face with mask; 1f922 sick face; 1f920 cowboy; 1f973 party face; 1f60e face with sunglasses
        1f913 nerd; 1f62d crying face; 1f621 angry face; 1f608 devil; 1f480 skull; 1f921 clown; 1f47b ghost
        1f47d alien; 1f916 robot; 1f383 pumpkin; 1f976 cold face; 1f607 angel""",
    "plant": """
        1f339 rose; 1f33b sunflower; 1f337 tulip; 1f338 cherry blossom; 1f335 cactus; 1f334 palm tree; 1f333 tree
        1f332 pine tree; 1f340 clover; 1f341 maple leaf; 1f344 mushroom""",
    "food": """
        1f34e apple; 1f34f green apple; 1f34a orange; 1f34b lemon; 1f34c banana; 1f349 watermelon; 1f347 grapes
        1f353 strawberry; 1f352 cherries; 1f351 peach; 1f34d pineapple; 1f345 tomato; 1f951 avocado; 1f346 eggplant
        1f955 carrot; 1f33d corn; 1f336 pepper; 1f966 broccoli; 1f35e bread; 1f950 croissant; 1f968 pretzel
        1f95e pancakes; 1f9c0 cheese; 1f354 burger; 1f35f fries; 1f355 pizza; 1f32d hot dog; 1f32e taco; 1f373 egg
        1f37f popcorn; 1f363 sushi; 1f366 ice cream; 1f369 doughnut; 1f36a cookie; 1f382 cake; 1f9c1 cupcake
        1f36d lollipop; 1f36f honey; 2615 coffee; 1f377 wine; 1f37a beer; 1f379 cocktail""",
    "heart": """
        2764 red heart; 1f9e1 orange heart; 1f49b yellow heart; 1f49a green heart; 1f499 blue heart
        1f49c purple heart; 1f5a4 black heart; 1f494 broken heart""",
    "vehicle": """
        1f697 car; 1f695 taxi; 1f68c bus; 1f693 police car; 1f691 ambulance; 1f692 fire engine; 1f69a truck
        1f69c tractor; 1f3ce racing car; 1f6f5 scooter; 1f6b2 bicycle; 1f682 train; 2708 airplane; 1f681 helicopter
        1f680 rocket; 1f6f8 flying saucer; 26f5 sailboat; 1f6a2 ship""",
    "place": """
        1f3e0 house; 1f3f0 castle; 26ea church; 1f3e5 hospital; 26fa tent; 1f3d4 mountain; 1f30b volcano""",
    "sky": """
        1f31e sun; 1f319 moon; 2b50 star; 2601 cloud; 1f327 rain; 26a1 lightning; 2744 snowflake; 26c4 snowman
        1f308 rainbow; 1f525 fire; 1f4a7 water drop; 1f30a wave; 2614 umbrella; 1f30d earth; 1fa90 planet""",
    "clothes": """
        1f455 shirt; 1f456 jeans; 1f457 dress; 1f9e6 socks; 1f9e4 gloves; 1f9e3 scarf; 1f45f shoe; 1f460 high heel
        1f462 boot; 1f451 crown; 1f3a9 top hat; 1f9e2 cap; 1f576 sunglasses; 1f392 backpack""",
    "thing": """
        26bd soccer ball; 1f3c0 basketball; 1f3be tennis ball; 1f3c6 trophy; 1f9f8 teddy bear; 1f388 balloon
        1f381 gift; 1f3b2 die; 1f3b8 guitar; 1f3ba trumpet; 1f941 drum; 1f4f7 camera; 1f4f1 phone; 1f4bb laptop
        1f4fa television; 1f4a1 light bulb; 1f4d5 book; 1f511 key; 1f528 hammer; 1f514 bell; 23f0 clock; 270f pencil
        2702 scissors; 1f9f2 magnet; 1f48e gem; 1f48d ring; 1f4a3 bomb; 1f384 christmas tree""",
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "blue": (120, 172, 240),
    "green": (140, 205, 140),
    "pink": (250, 184, 208),
    "yellow": (252, 234, 150),
    "purple": (190, 152, 230),
    "red": (226, 98, 98),
    "teal": (110, 200, 196),
}

# What a cat may be dyed with; the word comes before the noun in the caption.
DYES: dict[str, tuple[int, int, int]] = {
    "gray": (166, 168, 174),
    "black": (84, 82, 90),
    "white": (242, 240, 236),
    "brown": (140, 92, 60),
    "orange": (236, 130, 40),
    "blue": (90, 130, 220),
    "green": (100, 175, 90),
    "pink": (245, 140, 185),
    "purple": (150, 100, 205),
}


@dataclass(frozen=True)
class Glyph:
    """One drawable subject: its codepoint, its caption and its group."""

    codepoint: int
    caption: str
    group: str


def _parse() -> tuple[Glyph, ...]:
    glyphs = []
    for group, text in _TABLE.items():
        for entry in text.replace("\n", ";").split(";"):
            if entry.strip():
                code, caption = entry.strip().split(" ", 1)
                glyphs.append(Glyph(int(code, 16), caption, group))
    return tuple(glyphs)


GLYPHS = _parse()
INDEX = {glyph.caption: number for number, glyph in enumerate(GLYPHS)}
