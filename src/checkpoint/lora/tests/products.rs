//! LoKr and LoHa against arithmetic in f64.

use serde_json::json;

use super::*;

const KEY: &str = "lycoris_transformer_blocks_0_img_mlp_net_0_proj";
const PATH: &str = "transformer_blocks.0.img_mlp.net.0.proj";

/// A LoKr of a layer of [128, 32] with these factors.
fn lokr(factors: &[(&str, Tensor)]) -> TestFile {
    factors
        .iter()
        .fold(TestFile::default(), |file, (name, tensor)| {
            file.with(format!("{KEY}.{name}"), tensor.clone())
        })
}

fn full() -> [(&'static str, Tensor); 2] {
    [
        ("lokr_w1", f32s(&[8, 4], 1)),
        ("lokr_w2", Tensor::random(&[16, 8], 2, Dtype::BF16)),
    ]
}

fn half() -> [(&'static str, Tensor); 3] {
    [
        ("lokr_w1", f32s(&[8, 4], 1)),
        ("lokr_w2_a", f32s(&[16, 2], 2)),
        ("lokr_w2_b", f32s(&[2, 8], 3)),
    ]
}

fn split() -> [(&'static str, Tensor); 4] {
    [
        ("lokr_w1_a", f32s(&[8, 3], 1)),
        ("lokr_w1_b", f32s(&[3, 4], 2)),
        ("lokr_w2_a", f32s(&[16, 2], 3)),
        ("lokr_w2_b", f32s(&[2, 8], 4)),
    ]
}

/// The expected change, in f64.
fn kron(left: &[f64], right: &[f64], scale: f64) -> Vec<f64> {
    let whole = kronecker(left, [8, 4], right, [16, 8]);
    whole.into_iter().map(|it| it * scale).collect()
}

#[test]
fn a_lokr_of_whole_factors_ignores_alpha() {
    let [(_, left), (_, right)] = full();
    let expected = Change {
        factors: Factors::Kronecker {
            left: left.host(),
            right: right.host(),
        },
        scale: 1.0,
    };
    // Trainers store 1e10, which is infinite in f16.
    for alpha in [None, Some(0.5), Some(8.0), Some(f32::INFINITY)] {
        let mut file = lokr(&full());
        if let Some(alpha) = alpha {
            file = file.with(format!("{KEY}.alpha"), Tensor::scalar(alpha));
        }
        assert_eq!(*only(&file.changes()), expected);
        let open = file.open().unwrap();
        assert_eq!((open.rank(), open.uniform()), (None, None));
        assert_eq!(open.bytes(), file.read().bytes() as u64);
    }
    let file = lokr(&full()).with(format!("{KEY}.alpha"), Tensor::scalar(8.0));
    assert_near(
        &delta(only(&file.changes())),
        &kron(&left.values(), &right.values(), 1.0),
        1e-7,
    );
}

#[test]
fn a_lokr_of_products_has_alpha_over_rank() {
    // The rank of the second factor counts, where it is a product.
    let [(_, left), (_, a), (_, b)] = half();
    let right = product(&a.values(), &b.values(), 2, 8);
    for (alpha, scale) in [(None, 1.0), (Some(1.0), 0.5), (Some(0.0), 1.0)] {
        let mut file = lokr(&half());
        if let Some(alpha) = alpha {
            file = file.with(format!("{KEY}.alpha"), Tensor::scalar(alpha));
        }
        let expected = kron(&left.values(), &right, scale);
        assert_near(&delta(only(&file.changes())), &expected, 1e-6);
        assert_eq!(file.open().unwrap().bytes(), file.read().bytes() as u64);
    }

    let [(_, c), (_, d), (_, a), (_, b)] = split();
    let left = product(&c.values(), &d.values(), 3, 4);
    let right = product(&a.values(), &b.values(), 2, 8);
    let file = lokr(&split()).with(format!("{KEY}.alpha"), Tensor::scalar(1.0));
    assert_near(
        &delta(only(&file.changes())),
        &kron(&left, &right, 0.5),
        1e-6,
    );

    // Only the first is a product: its rank counts.
    let [(w1_a, c), (w1_b, d), ..] = split();
    let [_, (w2, right)] = full();
    let file = lokr(&[(w1_a, c), (w1_b, d), (w2, right.clone())]);
    let file = file.with(format!("{KEY}.alpha"), Tensor::scalar(1.0));
    let expected = kron(&left, &right.values(), 1.0 / 3.0);
    assert_near(&delta(only(&file.changes())), &expected, 1e-6);
}

#[test]
fn the_names_of_a_lokr_by_peft_are_known() {
    for (prefix, ending) in [
        ("base_model.model.", ""),
        ("base_model.model.", ".default"),
        ("transformer.", ".weight"),
    ] {
        let mut file = TestFile::default();
        for (name, tensor) in half() {
            file = file.with(format!("{prefix}{PATH}.{name}{ending}"), tensor);
        }
        assert_eq!(file.changes(), lokr(&half()).changes());
    }
}

/// PEFT multiplies by alpha / r also where both factors are whole.
#[test]
fn the_configuration_of_peft_scales_a_lokr() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = TestFile::default();
    for (name, tensor) in full() {
        file = file.with(format!("base_model.model.{PATH}.{name}"), tensor);
    }
    let config = json!({"peft_type": "LOKR", "r": 16, "alpha": 4, "rank_pattern": {}});
    std::fs::write(folder.path().join(PEFT_WEIGHTS), file.bytes()).unwrap();
    std::fs::write(folder.path().join(PEFT_CONFIG), config.to_string()).unwrap();
    let open = LoraFile::open(folder.path(), &targets(), &LoraOptions::default()).unwrap();
    assert_eq!(only(open.read("test").unwrap().changes()).scale, 0.25);
}

#[test]
fn a_lokr_of_a_fused_layer_is_split() {
    let key = "transformer_blocks.0.attn.to_qkv";
    for left in [[6, 4], [4, 4]] {
        let [rows, _] = left;
        let (w1, w2) = (f32s(&left, 1), f32s(&[96 / rows, 8], 2));
        let file = TestFile::default()
            .with(format!("{key}.lokr_w1"), w1.clone())
            .with(format!("{key}.lokr_w2"), w2.clone());
        let whole = kronecker(&w1.values(), left, &w2.values(), [96 / rows, 8]);
        let changes = file.changes();
        for (at, name) in ["to_q", "to_k", "to_v"].iter().enumerate() {
            let change = &changes[&format!("transformer_blocks.0.attn.{name}")];
            assert_eq!(change.factors.shape(), [32, 32]);
            let expected = &whole[at * 32 * 32..(at + 1) * 32 * 32];
            assert_near(&delta(change), expected, 1e-7);
        }
    }
}

/// A LoHa of a layer with these ranks.
fn loha(path: &str, ranks: [usize; 2]) -> (TestFile, Vec<f64>) {
    let AdapterTarget { d_in, d_out, .. } = target(path);
    let w1_a = f32s(&[d_out, ranks[0]], 1);
    let w1_b = f32s(&[ranks[0], d_in], 2);
    let w2_a = f32s(&[d_out, ranks[1]], 3);
    let w2_b = f32s(&[ranks[1], d_in], 4);
    let first = product(&w1_a.values(), &w1_b.values(), ranks[0], d_in);
    let second = product(&w2_a.values(), &w2_b.values(), ranks[1], d_in);
    let whole = first.iter().zip(second).map(|(a, b)| a * b).collect();
    let file = TestFile::default()
        .with(format!("{path}.hada_w1_a"), w1_a)
        .with(format!("{path}.hada_w1_b"), w1_b)
        .with(format!("{path}.hada_w2_a"), w2_a)
        .with(format!("{path}.hada_w2_b"), w2_b);
    (file, whole)
}

#[test]
fn a_loha_is_a_low_rank_product_of_the_square_of_its_rank() {
    for (ranks, alpha) in [([3, 3], 3.0), ([4, 4], 1.0), ([2, 5], 4.0)] {
        let (file, whole) = loha(PATH, ranks);
        let file = file.with(format!("{PATH}.alpha"), Tensor::scalar(alpha));
        let scale = f64::from(alpha) / ranks[0] as f64;
        let expected: Vec<f64> = whole.iter().map(|it| it * scale).collect();
        let changes = file.changes();
        let rank = Some(ranks[0] * ranks[1]);
        assert_eq!(only(&changes).factors.rank(), rank);
        assert_near(&delta(only(&changes)), &expected, 1e-6);
        let open = file.open().unwrap();
        assert_eq!((open.rank(), open.uniform()), (rank, None));
        assert_eq!(open.bytes(), file.read().bytes() as u64);
    }
}

#[test]
fn a_loha_above_the_largest_rank_is_dense() {
    // 23 · 23 = 529.
    let (file, expected) = loha(PATH, [23, 23]);
    let changes = file.changes();
    assert!(matches!(only(&changes).factors, Factors::Dense(_)));
    assert_near(&delta(only(&changes)), &expected, 1e-6);
    let open = file.open().unwrap();
    assert_eq!(open.rank(), None);
    assert_eq!(open.bytes(), file.read().bytes() as u64);
}

#[test]
fn products_that_overflow_are_refused() {
    let huge = |shape: &[usize]| Tensor::new(shape, &vec![1e30; shape[0] * shape[1]], Dtype::F32);
    let file = lokr(&[
        ("lokr_w1", f32s(&[8, 4], 1)),
        ("lokr_w2_a", huge(&[16, 2])),
        ("lokr_w2_b", huge(&[2, 8])),
    ]);
    assert!(
        file.refusal()
            .contains("lokr_w2_b, which has a value that is not a finite number")
    );
}
