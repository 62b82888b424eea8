"""Find the bundled watch lists: features of the bundled SAEs that fire in one language. Run after train_saes.py.

python find_watch_lists.py
"""

from pathlib import Path

import qscope_monitor as qs

TARGET = Path(__file__).parents[2] / "qscope_monitor" / "bundled" / "watch_lists"
LANGUAGES = ("zh",)

if __name__ == "__main__":
    model, tokenizer = qs.bundled.model(), qs.bundled.tokenizer()
    model.config._name_or_path = "qscope_monitor.bundled"  # not this machine's folder
    saes = qs.load_saes(qs.bundled.sae_path())
    for language in LANGUAGES:
        watch = qs.find_language_features(model, tokenizer, saes, target=language)
        watch.provenance["saes"] = "qscope_monitor.bundled"
        watch.save(TARGET / language)
        print(language, watch.evaluation["detectors"])
