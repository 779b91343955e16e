"""Text-video retrieval: how well captions and videos find each other, and `python train.py --search`.

The model is `side4video.Side4VideoRetrieval`. Every video and every caption is encoded once.
"""

import csv
import os
import statistics
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from common import read_checkpoint, save
from data import VideoError

DIRECTIONS = TEXT_TO_VIDEO, VIDEO_TO_TEXT = "text-to-video", "video-to-text"


@torch.no_grad()
def scores(model, texts, f, world, numbers=2**25):
    """The similarities of texts and videos -> (A, V), on the CPU. Tokens x frames of at most so many numbers at a time.

    texts: A of them. f (V, T, E): the features of the videos. numbers: 2^25 are 128 MB, and a handful exist.
    """
    rows, tokens = [], model.text.tokenize([""]).numel()  # L
    at_once = max(numbers // (f[..., 0].numel() * tokens), 1)
    for start in tqdm(range(0, len(texts), at_once), "comparing", leave=False, disable=world.rank > 0 or None):
        ids = model.text.tokenize(texts[start : start + at_once]).to(f.device)
        with world.autocast():
            g = model.text(ids)  # at_once x L x E
        rows.append(model.similarity(g, ids, f).cpu())
    return torch.cat(rows)


def recall(scores, captions):
    """How well captions find their video, and videos their captions -> metrics, {direction: the rank of each query}

    scores (A, V): captions x videos, first the captions of the first video. captions: how many each of the videos has.
    The metrics are R@1, R@5 and R@10 in percent, and the median and the mean rank (MdR, MnR). As CLIP4Clip evaluates:
    Every caption asks for its video. A video asks for captions, and those of one video are as good as the best of them.
    A score that n candidates share has n ranks, which all count. Where videos have several captions, the median of an
    even number of their ranks is the lower one of the two in the middle.
    """
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))  # A
    best = torch.stack([some.amax(0) for some in scores.split(captions)]).T  # videos x whose captions
    metrics, first = {}, {}
    for direction, table, right in zip(DIRECTIONS, (scores, best), (owner, torch.arange(len(captions)))):
        own = table.gather(1, right[:, None])
        higher, equal = (table > own).sum(1).tolist(), (table == own).sum(1).tolist()
        ranks = [rank for h, e in zip(higher, equal) for rank in range(1 + h, 1 + h + e)]
        median = statistics.median_low if len(table) > len(captions) else statistics.median
        metrics |= {f"{direction} R@{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        metrics |= {f"{direction} MdR": float(median(ranks)), f"{direction} MnR": sum(ranks) / len(ranks)}
        first[direction] = [1 + h for h in higher]
    return metrics, first


def evaluate(model, outputs, videos, splits, world, table):
    """The metrics of `recall` over the videos of all processes -> (result, why videos were skipped)

    outputs: what `train.outputs` yields. videos: how many there are; a signal ends it earlier, and without a result.
    table: the CSV file for the rank of each query. Where videos have mirrors in time, the result also says how often a
    caption prefers its video to the mirror, in percent; a model of single frames cannot know (50 %).
    """
    found, skipped = {}, []
    for features, label, paths, problems in outputs:
        skipped += filter(None, problems)
        found |= {
            path: f for path, f, k in zip(paths, features.float().mean(1).cpu(), label) if k >= 0
        }  # mean of the views
    parts, skipped = zip(*world.gather((found, skipped)))
    found, skipped = dict(sorted(chain(*(part.items() for part in parts)))), list(chain(*skipped))
    if len(found) + len(skipped) < videos:
        return {}, skipped
    if not found:
        raise VideoError(f"there is no video to evaluate on{''.join(f'; {why}' for why in skipped[:1])}")

    captions = [splits.captions[path] for path in found]
    pairs = [(text, path) for path, texts in zip(found, captions) for text in texts]
    similarity = scores(model, [text for text, _ in pairs], torch.stack([*found.values()]).to(world.device), world)
    result, ranks = recall(similarity, [len(texts) for texts in captions])
    if splits.mirrors:
        number = {path: v for v, path in enumerate(found)}
        mirrored = [
            (c, path, splits.mirrors[path]) for c, (_, path) in enumerate(pairs) if splits.mirrors[path] in number
        ]
        own, mirror = torch.tensor([[similarity[c, number[path]] for path in both] for c, *both in mirrored]).T
        result["over the mirror"] = 100 * ((own > mirror) + 0.5 * (own == mirror)).mean().item()
    if world.rank == 0:
        tqdm.write(f"{len(found)} videos: " + ", ".join(f"{name} {value:.1f}" for name, value in result.items()))
        with open(table, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["direction", "query", "video", "rank"])
            rows.writerows((TEXT_TO_VIDEO, *pair, rank) for pair, rank in zip(pairs, ranks[TEXT_TO_VIDEO]))
            rows.writerows((VIDEO_TO_TEXT, path, path, rank) for path, rank in zip(found, ranks[VIDEO_TO_TEXT]))
    return result | {"videos": len(found)}, skipped


def search(model, sentence, paths, outputs, checkpoint, run, world):
    """Prints the five videos that fit a sentence best. Raises VideoError, after them, for unreadable videos.

    paths: of the videos. outputs: a function of paths that yields what `train.outputs` does. Features are kept in a
    file beside the checkpoint, and computed again after a change of a video's size or date, or of the checkpoint.
    """
    if not paths:
        raise ValueError("say with --videos where to search")
    file, failed = Path(checkpoint).with_suffix(".features.pt"), []
    made_with = [stamp(checkpoint), repr(run)]
    kept = read_checkpoint(file) if file.exists() else {}
    videos = kept["videos"] if kept.get("made_with") == made_with else {}  # (path, size, date) -> f (T, E)
    new = [path for path in paths if stamp(path) not in videos]
    for features, label, names, problems in outputs(new) if new else ():
        failed += filter(None, problems)
        videos |= {stamp(path): f for path, f, k in zip(names, features.float().mean(1).cpu(), label) if k >= 0}
    if new:
        save({"made_with": made_with, "videos": videos}, file)
    found = {path: videos[stamp(path)] for path in paths if stamp(path) in videos}
    if found:
        similarity = scores(model, [sentence], torch.stack([*found.values()]).to(world.device), world)[0]
        for value, path in sorted(zip(similarity.tolist(), found), reverse=True)[:5]:
            print(f"{value:.4f}  {path}")
    if failed:
        raise VideoError("\n  ".join(failed))


def stamp(path):
    """What changes when a file does: its path, size, and the nanosecond when it was written last"""
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns
