//! Random adapters that use every feature of the format.

use std::collections::BTreeMap;

use lora_core::{
    Adapter, AdapterInfo, DType, ExpertLayout, HostTensor, LayerIdx, LowRank, RowOrder, SiteKey,
    SiteWeights, TargetModule,
};
use proptest::prelude::*;

/// The shape of an adapter's routed experts.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// Number of experts; 1 also stands for one pair that all experts share.
    pub count: usize,
    /// Number of sites with routed experts.
    pub sites: usize,
    /// Number of sides (A or B) that all experts of a site share.
    pub shared: usize,
    /// Whether a site shares one side among its experts but not the other.
    pub one_side_shared: bool,
    /// Whether the gate or the up projection is adapted.
    pub gate_or_up: bool,
    /// Whether gate and up of a layer cannot be one update.
    pub gate_and_up_differ: bool,
}

pub fn layout() -> impl Strategy<Value = ExpertLayout> {
    proptest::sample::select(&ExpertLayout::ALL[..])
}

/// The shape of an adapter.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    layers: u32,
    experts: usize,
    hidden: usize,
    inner: usize,
    dtype: DType,
    variant: Variant,
    /// Whether some module of some layer may lack its update.
    holes: bool,
    /// Whether gate and up share A.
    tied: bool,
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Variant {
    Plain,
    Dora,
    OutputBias,
    Ends,
    Experts,
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Routed experts are listed three times, as their layouts are the most error-prone.
const VARIANTS: [Variant; 7] = [
    Variant::Plain,
    Variant::Dora,
    Variant::OutputBias,
    Variant::Ends,
    Variant::Experts,
    Variant::Experts,
    Variant::Experts,
];

pub fn adapter() -> impl Strategy<Value = (Adapter, Experts)> {
    let sizes = (1..4u32, 1..6usize, 1..7usize, 1..7usize);
    let kinds = (proptest::sample::select(&DTYPES[..]), proptest::sample::select(&VARIANTS[..]));
    (sizes, kinds, any::<[bool; 2]>(), any::<u64>()).prop_map(|(sizes, kinds, flags, seed)| {
        let (layers, experts, hidden, inner) = sizes;
        let ((dtype, variant), [holes, tied]) = (kinds, flags);
        let recipe = Recipe { layers, experts, hidden, inner, dtype, variant, holes, tied, seed };
        make(recipe)
    })
}

/// A stream of small numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, bound: u64) -> usize {
        (self.next() % bound) as usize
    }

    fn tensor(&mut self, dtype: DType, shape: &[usize]) -> HostTensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|_| self.below(2001) as f32 / 1000.0 - 1.0).collect();
        HostTensor::from_f32(dtype, shape.to_vec(), &values).unwrap()
    }

    fn scale(&mut self) -> f32 {
        [0.5, 2.0, 1.0 / 3.0, 0.123_456_79][self.below(4)]
    }
}

fn make(recipe: Recipe) -> (Adapter, Experts) {
    let mut numbers = Numbers(recipe.seed);
    let mut sites = BTreeMap::new();
    for layer in (0..recipe.layers).map(LayerIdx) {
        for (module, input, output) in [
            (TargetModule::AttnQ, recipe.hidden, recipe.inner),
            (TargetModule::AttnDense, recipe.inner, recipe.hidden),
            (TargetModule::MlpGateUp, recipe.hidden, 2 * recipe.inner),
        ] {
            if recipe.holes && numbers.below(3) == 0 {
                continue;
            }
            let low = dense(&mut numbers, recipe, [input, output]);
            let bias = recipe.variant == Variant::Plain && module == TargetModule::AttnQ;
            let base_bias = bias.then(|| numbers.tensor(recipe.dtype, &[output]));
            let site = SiteWeights { base_bias, ..low.into() };
            sites.insert(SiteKey::Layer(layer, module), site);
        }
        if recipe.variant == Variant::Experts {
            experts(&mut numbers, recipe, layer, &mut sites);
        }
    }
    if recipe.variant == Variant::Ends {
        ends(&mut numbers, recipe, &mut sites);
    }
    let described = describe(&sites);
    (Adapter::new(sites, AdapterInfo::default(), None), described)
}

fn dense(numbers: &mut Numbers, recipe: Recipe, [input, output]: [usize; 2]) -> LowRank {
    let rank = 1 + numbers.below(5);
    let mut vector = |wanted: Variant| {
        (recipe.variant == wanted).then(|| numbers.tensor(recipe.dtype, &[output]))
    };
    let (magnitude, b_bias) = (vector(Variant::Dora), vector(Variant::OutputBias));
    LowRank {
        rank,
        scale: numbers.scale(),
        a: numbers.tensor(recipe.dtype, &[rank, input]),
        b: numbers.tensor(recipe.dtype, &[output, rank]),
        magnitude,
        b_bias,
        rows: RowOrder::ByPart,
    }
}

fn ends(numbers: &mut Numbers, recipe: Recipe, sites: &mut BTreeMap<SiteKey, SiteWeights>) {
    let (vocab, hidden) = (9, recipe.hidden);
    let weight = |numbers: &mut Numbers| Some(numbers.tensor(recipe.dtype, &[vocab, hidden]));
    for (key, input, output) in [(SiteKey::Embed, vocab, hidden), (SiteKey::Head, hidden, vocab)] {
        let mut site = SiteWeights::default();
        let kind = numbers.below(4);
        if kind & 1 == 1 {
            site.low_rank = Some(dense(numbers, recipe, [input, output]));
        }
        if kind & 2 == 2 {
            site.replacement = weight(numbers);
        }
        if kind > 0 {
            sites.insert(key, site);
        }
    }
}

fn experts(
    numbers: &mut Numbers,
    recipe: Recipe,
    layer: LayerIdx,
    sites: &mut BTreeMap<SiteKey, SiteWeights>,
) {
    let Recipe { hidden, inner, .. } = recipe;
    let mut first: Option<LowRank> = None;
    for (module, input, output) in [
        (TargetModule::MoeHTo4h, hidden, inner),
        (TargetModule::MoeGate, hidden, inner),
        (TargetModule::Moe4hToH, inner, hidden),
    ] {
        let side = |numbers: &mut Numbers| match numbers.below(4) {
            0 => 1,
            _ => recipe.experts,
        };
        let mut low = dense(numbers, recipe, [input, output]);
        let sides = [side(numbers), side(numbers)];
        low.a = numbers.tensor(recipe.dtype, &[sides[0], low.rank, input]);
        low.b = numbers.tensor(recipe.dtype, &[sides[1], output, low.rank]);
        if let (TargetModule::MoeGate, Some(gate)) = (module, &first) {
            if recipe.tied {
                (low.rank, low.a) = (gate.rank, gate.a.clone());
                low.b = numbers.tensor(recipe.dtype, &[recipe.experts, output, low.rank]);
            }
            if numbers.below(8) > 0 {
                low.scale = gate.scale;
            }
        }
        if recipe.holes && numbers.below(3) == 0 {
            continue;
        }
        if module == TargetModule::MoeHTo4h {
            first = Some(low.clone());
        }
        sites.insert(SiteKey::Layer(layer, module), low.into());
    }
}

fn describe(sites: &BTreeMap<SiteKey, SiteWeights>) -> Experts {
    let mut found = Experts {
        count: 1,
        sites: 0,
        shared: 0,
        one_side_shared: false,
        gate_or_up: false,
        gate_and_up_differ: false,
    };
    for (key, site) in sites {
        let SiteKey::Layer(layer, module) = *key else { continue };
        let Some(low) = site.low_rank.as_ref().filter(|_| module.is_routed_expert()) else {
            continue;
        };
        let [a, b] = [low.a.shape()[0], low.b.shape()[0]];
        found.sites += 1;
        found.count = found.count.max(a).max(b);
        found.one_side_shared |= a != b;
        found.gate_or_up |= module != TargetModule::Moe4hToH;
        let up = sites.get(&SiteKey::Layer(layer, TargetModule::MoeGate));
        if let (TargetModule::MoeHTo4h, Some(up)) = (module, up.and_then(|s| s.low_rank.as_ref())) {
            found.gate_and_up_differ |= low.scale != up.scale;
        }
    }
    let routed =
        sites.iter().filter(|(key, _)| key.module().is_some_and(TargetModule::is_routed_expert));
    let lows = routed.filter_map(|(_, site)| site.low_rank.as_ref());
    let sides = lows.flat_map(|low| [low.a.shape()[0], low.b.shape()[0]]);
    found.shared = sides.filter(|extent| *extent != found.count).count();
    found
}
