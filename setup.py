"Everything said here comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib, extra = cfg['lib_name'], '_requirements'

setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'].upper(),
    license_files=['LICENSE'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    keywords=cfg['keywords'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['py.typed', 'data/**/*', 'static/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(extra): v.split() for k, v in cfg.items() if k.endswith(extra)},
    entry_points={
        'console_scripts': [f'{lib}={lib}.cli:main'],
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
    zip_safe=False,
)
