"""Merge methods: ``rankwise methods NAME`` describes one, the file of its name's line here holds it.

    average              weighings.py            magnitude_prune       entries.py
    breadcrumbs          entries.py              model_stock           weighings.py
    breadcrumbs_ties     entries.py              multislerp            weighings.py
    cat                  sums.py                 nearswap              selections.py
    dare_linear          entries.py              nuslerp               weighings.py
    dare_ties            entries.py              quality_diversity     quality_diversity.py
    della                entries.py              robust_interpolation  robust.py
    della_linear         entries.py              robust_signature      signatures.py
    greedy_soup          soups.py                sce                   selections.py
    interpolation        interpolation.py        slerp                 weighings.py
    karcher              weighings.py            sparse_sum            sparse_sum.py
    knots                knots.py                svd                   sums.py
    learned_soup         soups.py                task_arithmetic       weighings.py
    lego                 lego.py                 ties                  entries.py
    linear               sums.py                 uniform_soup          soups.py

``sparsify.py`` and ``straggler.py`` hold what several of them share.
"""
