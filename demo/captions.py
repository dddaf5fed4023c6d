"""English captions of scenes: synonyms, several word orders, and what goes without saying left out.

A caption that names no light means noon; no camera, a camera that is still; no motion, a subject that stands still.
"""

import random

from demo.world import Scene, sample, scene_of

SUBJECTS = {
    "ball": ["ball", "ball", "beach ball", "round ball"],
    "cube": ["cube", "cube", "box", "block"],
    "star": ["star", "star", "five-pointed star"],
    "boat": ["boat", "boat", "sailing boat", "little ship", "sailboat"],
    "balloon": ["balloon", "balloon", "party balloon"],
    "bird": ["bird", "bird", "little bird", "songbird"],
    "fish": ["fish", "fish", "little fish", "striped fish"],
    "car": ["car", "car", "little car", "toy car", "automobile"],
}
COLOURS = {
    "red": ["red", "red", "crimson", "scarlet"],
    "orange": ["orange", "orange", "tangerine"],
    "yellow": ["yellow", "yellow", "golden", "lemon yellow"],
    "green": ["green", "green", "emerald"],
    "blue": ["blue", "blue", "azure"],
    "purple": ["purple", "purple", "violet"],
    "pink": ["pink", "pink", "rosy"],
    "white": ["white", "white", "ivory", "pearly"],
}
#            "a ball …"                                              "a ball, …"
MOTIONS = {
    "drift left": (["drifts to the left", "glides left", "moves slowly to the left", "travels left"],
                   ["drifting to the left", "gliding left", "moving to the left"]),
    "drift right": (["drifts to the right", "glides right", "moves slowly to the right", "travels right"],
                    ["drifting to the right", "gliding right", "moving to the right"]),
    "bounce": (["bounces", "bounces up and down", "hops", "keeps bouncing"], ["bouncing", "hopping up and down"]),
    "circle": (["circles", "moves in a circle", "goes round and round", "flies in circles"],
               ["circling", "moving in circles"]),
    "rise": (["rises", "rises slowly", "floats upwards", "climbs again and again"], ["rising", "floating upwards"]),
    "sink": (["sinks", "sinks slowly", "floats downwards", "descends again and again"], ["sinking", "descending"]),
    "spin": (["spins", "turns on the spot", "rotates", "spins around"], ["spinning", "turning on the spot"]),
    "sway": (["sways", "swings from side to side", "rocks to and fro"], ["swaying", "rocking to and fro"]),
    "still": (["stands still", "stays where it is", "does not move", "rests"], ["standing still", "resting"]),
}
SETTINGS = {
    "meadow": ["on a meadow", "in a meadow", "over a flowery meadow", "in a grassy field"],
    "sea": ["at sea", "on the sea", "over the ocean", "above the waves"],
    "desert": ["in the desert", "in a desert", "among sand dunes", "over the dunes"],
    "snow": ["in a snowy landscape", "in the snow", "among snowy mountains", "over snowy hills"],
    "city": ["in a city", "in the city", "downtown", "on a street in town", "in front of tall buildings"],
    "forest": ["in a forest", "in the forest", "in the woods", "among the trees"],
}
LIGHTS = {
    "noon": ["at noon", "in bright daylight", "on a sunny day", "under a clear sky"],
    "sunset": ["at sunset", "at dusk", "in the evening glow", "as the sun goes down"],
    "night": ["at night", "in the moonlight", "under the stars", "by night"],
    "snowfall": ["in falling snow", "while it snows", "as snowflakes fall", "during a snowfall"],
    "rain": ["in the rain", "while it rains", "on a rainy day", "in a downpour"],
}
CAMERAS = {
    "still": ["The camera is still", "A static shot", "The camera does not move"],
    "pan": ["The camera pans from side to side", "A panning shot", "The camera swings slowly left and right"],
    "zoom": ["The camera zooms in and out", "A slow zoom", "The camera moves closer and back again"],
}
# What people write too, and what says nothing of a scene.
FILLERS = ["beautiful", "lovely", "cheerful", "realistic", "highly detailed", "cinematic", "4k", "funny", "quiet",
           "please", "a video of", "in the style of a film", "very nice", "happily", "somewhere", "today", "magic"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNSAID = {"motion": "still", "light": "noon", "camera": "still"}

ORDERS = [
    "{A} {thing} {does} {place} {light}. {camera}.",
    "{A} {thing} {does} {place} {light}, {camera_low}.",
    "{A} {thing} {does} {light} {place}. {camera}.",
    "{light}, {a} {thing} {does} {place}. {camera}.",
    "{place}, {a} {thing} {does} {light}. {camera}.",
    "{place} {light}: {a} {thing}, {doing}. {camera}.",
    "{A} {thing}, {doing} {place} {light}. {camera}.",
    "{camera}: {a} {thing} {does} {place} {light}.",
    "{camera}. {A} {thing} {place}, {light}, {doing}.",
    "There is {a} {noun} {place} {light}. It is {colour} and {does}. {camera}.",
    "{A} {noun} that is {colour} {does} {place} {light}. {camera}.",
]


def caption(scene: Scene, rng: random.Random, vague: float = 0.0) -> str:
    """One of many captions of a scene. vague: how often it does not say where."""
    unsaid = {name for name, value in UNSAID.items()
              if getattr(scene, name) == value and rng.random() < (0.6 if name == "camera" else 0.2)}
    noun, colour = rng.choice(SUBJECTS[scene.subject]), rng.choice(COLOURS[scene.colour])
    thing = f"{colour} {noun}"
    article = "the" if rng.random() < 0.1 else None
    if "motion" in unsaid:
        does, doing = "is there", "nothing else"
    else:
        does, doing = (rng.choice(words) for words in MOTIONS[scene.motion])
    order = rng.choice(ORDERS)
    a = article or ("an" if (noun if "{a} {noun}" in order.lower() else thing)[0] in "aeiou" else "a")
    words = {
        "a": a, "A": a, "thing": thing, "noun": noun, "colour": colour, "does": does, "doing": doing,
        "place": "" if rng.random() < vague else rng.choice(SETTINGS[scene.setting]),
        "light": "" if "light" in unsaid else rng.choice(LIGHTS[scene.light]),
        "camera": "" if "camera" in unsaid else rng.choice(CAMERAS[scene.camera]),
    }
    words["camera_low"] = words["camera"][:1].lower() + words["camera"][1:]
    return _tidy(order.format(**words))


def as_people_write(text: str, rng: random.Random) -> str:
    """A caption with up to three words in it that mean nothing to the world."""
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        nonsense = "".join(rng.choices(LETTERS, k=rng.randint(2, 8)))
        words.insert(rng.randint(0, len(words)), rng.choice([*FILLERS, nonsense, nonsense, nonsense]))
    return " ".join(words)


def _tidy(text: str) -> str:
    """Mends the punctuation around what was left out; capitals at the start of sentences."""
    text = text.replace(", nothing else", "")
    sentences = []
    for part in text.split(". "):
        part = " ".join(part.replace(" ,", ",").replace(" .", ".").replace(" :", ":").split()).strip(" ,:.")
        part = part.replace(",,", ",")
        if part:
            sentences.append(part[0].upper() + part[1:])
    return ". ".join(sentences) + "."


def plain(scene: Scene) -> str:
    """The caption of a scene in the commonest words, with everything said."""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    text = (f"{article} {scene.colour} {scene.subject} {MOTIONS[scene.motion][0][0]} {SETTINGS[scene.setting][0]} "
            f"{LIGHTS[scene.light][0]}")
    camera = "" if scene.camera == "still" else f" {CAMERAS[scene.camera][0]}."
    return text[0].upper() + text[1:] + "." + camera


def corpus(lines: int = 4000, seed: int = 0) -> list[str]:
    """Captions that a tokenizer learns its words from; every word of this file is in them."""
    import torch

    rng = random.Random(seed)
    scenes = sample(lines, 1, torch.Generator().manual_seed(seed))[:, 0]
    words = [word for table in (SUBJECTS, COLOURS, SETTINGS, LIGHTS, CAMERAS) for many in table.values()
             for word in many]
    words += [word for pair in MOTIONS.values() for many in pair for word in many]
    return [caption(scene_of(scene), rng) for scene in scenes.tolist()] + words


