"The published answers of results/: the tables follow from them, and some rows can be run again"
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from attn_diversity.evidence import probe, probe_runs, read_right

here = Path(__file__).resolve().parent.parent
shared = here.parent/'shared'
sizes = dict(flowers=3817, hymenoptera=398, flowers_tuned=764, cifar10_tuned=10000,
             flowers_through=764, cifar10_through=10000)

def interval(before, after): # Agresti and Min's, from the four counts
    counts = pd.crosstab(before, after).reindex(index=[False,True], columns=[False,True], fill_value=0)+.5
    n = counts.to_numpy().sum()
    only_before,only_after = counts.loc[True,False]/n,counts.loc[False,True]/n
    middle = only_before-only_after
    half = 1.96*((only_before+only_after-middle**2)/n)**.5
    return 100*(middle-half), 100*(middle+half)

@pytest.mark.parametrize('name', sizes)
def test_tables_follow_from_the_answers(name):
    table,right = pd.read_csv(here/'results'/f'{name}.csv'),read_right(here/'results'/f'{name}_right.csv.gz')
    assert len(table)==len(right)
    for row in table.to_dict('records'):
        of_seed = f' seed {row["seed"]}' if name.endswith(('tuned','through')) else ''
        mine,first = (right[run+of_seed, row['question']] for run in (row['run'],'unpruned'))
        assert len(mine)==row['photographs'] and abs(len(mine)-sizes[name])<10
        assert np.isclose(row['accuracy'], 100*mine.sum()/len(mine))
        assert np.isclose(row['lost'], 100*(first.sum()-mine.sum())/len(mine))
        low,high = (0.,0.) if row['run']=='unpruned' else interval(first, mine)
        assert np.allclose((row['lost low'],row['lost high']), (low,high))

@pytest.mark.parametrize('name', sizes)
def test_methods_of_one_cost(name):
    table = pd.read_csv(here/'results'/f'{name}.csv')
    assert (table.GFLOPs/table.price-1).abs().max()<.04
    for column in ('commit','torch','timm','device','seed'): assert table[column].notna().all(), column

@pytest.mark.slow
def test_some_rows_again(tmp_path):
    weights,photos = shared/'models'/'vit_small_patch14_saliency.safetensors',shared/'data'/'hymenoptera'
    if not (weights.is_file() and photos.is_dir()): pytest.skip('../shared is not there: no weights, no photographs')
    from attn_diversity.attention import example_vit
    model = example_vit(weights).eval()
    runs = probe_runs(model)
    runs = runs[runs.run.isin(['unpruned','variance 0.3','tome 0.3','fold 0.3'])]
    torch.manual_seed(0)
    _,again = probe(model, photos, tmp_path, runs)
    published = read_right(here/'results'/'hymenoptera_right.csv.gz')
    for k,right in again.items():
        assert (right!=published[k]).mean()<=.02, k # bfloat16 on another processor may turn a few
