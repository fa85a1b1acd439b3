"""Reads settings.ini, so that dependencies, extras and scripts are written once."""
from configparser import ConfigParser
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lines = lambda key: [l.strip() for l in cfg.get(key, "").splitlines() if l.strip() and not l.strip().startswith("#")]
extras = {k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")}
packages = [*find_packages(include=["medft", "medft.*"]), "medft.nbs", "medft.recipes"]
setup(packages=packages, install_requires=lines("requirements"), extras_require=extras,
      entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["medft = medft._modidx:d"]})
