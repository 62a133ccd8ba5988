"Predicting and evaluating against fastai's own validation, and what a folder may hold"
import warnings
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from attn_diversity.choose import choose
from attn_diversity.data import folder_dls
from attn_diversity.learner import load_vit, prune_learner, save_vit
from attn_diversity.predict import by_class, evaluate, predict

TINY = dict(pretrained=False, patch_size=8, embed_dim=32, depth=3, num_heads=4)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A folder of photographs of no size in particular, and an untrained model that was saved"
    tmp,rng = tmp_path_factory.mktemp('predict'),np.random.default_rng(0)
    for part,n in (('train',4), ('val',9)):
        for c in ('ant','bee','cat'):
            (tmp/'photos'/part/c).mkdir(parents=True)
            for i in range(n):
                h,w = rng.integers(20, 90, 2)
                pixels = rng.integers(0, 256, (h//4+1,w//4+1,3), dtype=np.uint8)
                Image.fromarray(pixels).resize((w,h)).save(tmp/'photos'/part/c/f'{i}.png')
    torch.manual_seed(0)
    dls = folder_dls(tmp/'photos', img_size=32, batch_size=4, n_workers=0)
    learn = prune_learner(dls, 'vit_tiny_patch16_224', keep_rate=.5, **TINY)
    torch.nn.init.normal_(learn.model.head.weight) # answers of all kinds
    return tmp, learn, save_vit(learn, tmp/'run')

def test_evaluate_is_fastais_validation(run):
    tmp,learn,saved = run
    found = evaluate(load_vit(saved), tmp/'photos', seconds=0, batch_size=5, n_workers=3)
    probs,targets = learn.get_preds()
    names = list(learn.dls.vocab)
    files = [str(f) for f in learn.dls.valid_ds.items]
    want = pd.DataFrame({'file': files, 'class': [names[t] for t in targets],
                         'predicted': [names[p] for p in probs.argmax(1)], 'probability': probs.amax(1)})
    have = found.each[list(want)].astype({'class': str, 'predicted': str})
    want,have = (t.sort_values('file').reset_index(drop=True) for t in (want, have))
    pd.testing.assert_frame_equal(have, want, atol=1e-5, check_dtype=False)
    with learn.no_bar(): assert found.table.accuracy[0]==pytest.approx(learn.validate()[1], abs=1e-6)
    assert found.each.predicted.nunique()>1 # else nothing was tested
    assert by_class(found.each).photographs.tolist()==[9]*3
    answers = predict(load_vit(saved), files, top=1)
    assert answers.file.tolist()==files
    assert answers['class'].tolist()==[names[p] for p in probs.argmax(1)]

def test_the_folder_of_the_training_is_no_test(run):
    tmp,_,saved = run
    model = load_vit(saved)
    for folder,known in ((tmp/'photos', False), (tmp/'photos'/'val', False), (tmp/'photos'/'train', True)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            evaluate(model, folder, seconds=0)
        assert any('was trained on' in str(w.message) for w in said)==known, folder

def test_unreadable_photographs_are_named_and_left_out(run):
    tmp,_,saved = run
    model = load_vit(saved)
    before = evaluate(model, tmp/'photos', (1,.5), seconds=0).table
    bad = tmp/'photos'/'val'/'ant'/'5b.png' # in the middle
    bad.write_bytes((tmp/'photos'/'val'/'ant'/'5.png').read_bytes()[:40])
    try:
        with pytest.warns(UserWarning, match='Left out 1 of 28 files'):
            after = evaluate(model, tmp/'photos', (.5,1), seconds=0, batch_size=3)
        with pytest.warns(UserWarning, match='Left out 1 of 10 files'):
            assert len(predict(model, bad.parent, top=2))==18
    finally: bad.unlink()
    assert list(after.left_out)==[str(bad)]
    same = [c for c in before if c not in ('images/s','gain')]
    pd.testing.assert_frame_equal(after.table[same], before[same])

def test_a_model_on_another_device_or_in_half_precision(run):
    tmp,_,saved = run
    model = load_vit(saved).to(torch.bfloat16)
    table = evaluate(model, tmp/'photos', seconds=0).table
    assert table.photographs[0]==27 and predict(model, tmp/'photos'/'val'/'ant').probability.le(1).all()

def test_choose_finds_what_was_saved_with_a_model(run):
    "The model's own method takes part, and the choice can be saved and loaded"
    tmp,learn,saved = run
    choice = choose(load_vit(saved), tmp/'photos', 100, 'tome', (.5,), seconds=0)
    assert choice.table.method.tolist()==['none','variance','tome']
    assert choice.table.within.all()
    assert choice.model.recipe['pruning']==choice.setting
