"The published answers of results/: the tables follow from them, and some rows can be run again"
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, safetensors.torch, timm, torch
from PIL import Image
from attn_diversity import trained
from attn_diversity.evidence import probe, probe_runs, read_right
from attn_diversity.trained import evidence_command

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

def test_the_command_asks_a_frozen_vit_and_times_it(tmp_path, capsys, monkeypatch):
    "A file of weights, a folder of pictures; begun again it computes nothing twice. (Two methods of seven)"
    monkeypatch.setattr(trained, 'probe_runs', partial(probe_runs, methods=('random','fold')))
    model = timm.create_model('deit_tiny_patch16_224', img_size=64, num_classes=0)
    safetensors.torch.save_file(model.state_dict(), tmp_path/'w.safetensors')
    for i in range(20):
        folder = tmp_path/'photos'/'ab'[i%2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (64,64,3), dtype=np.uint8)
        Image.fromarray(noise).save(folder/f'{i}.png')
    asked = dict(arch='deit_tiny_patch16_224', checkpoint=str(tmp_path/'w.safetensors'), keep_rates='.5',
                 img_size=64, out=str(tmp_path/'out'))
    table = evidence_command(str(tmp_path/'photos'), seconds=.01, **asked)
    speed = pd.read_csv(tmp_path/'out'/'speed.csv')
    assert list(speed.run)==list(dict.fromkeys(table.run)) and 'how fast' in capsys.readouterr().out
    times = {f: f.stat().st_mtime_ns for f in (tmp_path/'out'/'features').glob('*.npy')}
    pd.testing.assert_frame_equal(evidence_command(str(tmp_path/'photos'), **asked), table)
    assert times=={f: f.stat().st_mtime_ns for f in times} and len(times)==3

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
