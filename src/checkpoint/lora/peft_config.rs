//! The numbers that PEFT writes in `adapter_config.json`, and diffusers in the header of a file.

use regex::{RegexSet, RegexSetBuilder};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::error::{DeclaredIn, LoraFault, Refusal, shown};

/// PEFT's default of `lora_alpha` and `alpha`.
const DEFAULT_ALPHA: f64 = 8.0;

/// The most patterns of one kind: more than models have layers.
const MAX_PATTERNS: usize = 10_000;

/// Bytes of memory that the compiled patterns of one configuration may take.
const PATTERN_BYTES: usize = 16 << 20;

/// Values of `init_lora_weights` that change nothing but the factors.
const PLAIN_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// A configuration of PEFT. Diffusers puts the name of the component before each name.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Fields {
    #[serde(alias = "transformer.peft_type")]
    peft_type: Option<String>,
    #[serde(alias = "transformer.r")]
    r: Option<f64>,
    #[serde(alias = "transformer.lora_alpha")]
    lora_alpha: Option<f64>,
    /// Of LoKr and LoHa.
    #[serde(alias = "transformer.alpha")]
    alpha: Option<f64>,
    #[serde(alias = "transformer.rank_pattern")]
    rank_pattern: Option<Pattern>,
    #[serde(alias = "transformer.alpha_pattern")]
    alpha_pattern: Option<Pattern>,
    #[serde(alias = "transformer.use_rslora")]
    use_rslora: Option<bool>,
    #[serde(alias = "transformer.use_dora")]
    use_dora: Option<bool>,
    #[serde(alias = "transformer.init_lora_weights")]
    init_lora_weights: Option<Value>,
    /// Variants of LoRA with other arithmetic.
    #[serde(alias = "transformer.use_qalora")]
    use_qalora: Option<Value>,
    #[serde(alias = "transformer.use_bdlora")]
    use_bdlora: Option<Value>,
    #[serde(alias = "transformer.kasa_config")]
    kasa_config: Option<Value>,
    #[serde(alias = "transformer.monteclora_config")]
    monteclora_config: Option<Value>,
}

/// Values by patterns of module names, in the order of the file.
#[derive(Debug, Default, PartialEq)]
struct Pattern(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Pattern;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("numbers by patterns of module names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pattern, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pattern(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// Numbers by module: the first pattern that matches, else the common number.
#[derive(Debug)]
struct ByModule {
    patterns: Vec<(String, f64)>,
    /// The patterns that are more than names, and the index of each.
    expressions: RegexSet,
    indices: Vec<usize>,
    common: Option<f64>,
}

impl ByModule {
    fn new(pattern: Option<Pattern>, common: Option<f64>) -> Result<Self, String> {
        let Pattern(patterns) = pattern.unwrap_or_default();
        if patterns.len() > MAX_PATTERNS {
            return Err(format!("it has more than {MAX_PATTERNS} patterns"));
        }
        let mut values = patterns.iter().map(|(_, value)| value).chain(&common);
        if let Some(large) = values.find(|it| !is_number(**it)) {
            return Err(format!("the number {large:e} is too large"));
        }
        let indices: Vec<usize> = (0..patterns.len())
            .filter(|at| !is_name(&patterns[*at].0))
            .collect();
        // As PEFT matches: the end of the name, from a dot or the start of the name on.
        let expressions = indices.iter().map(|at| &patterns[*at].0);
        let expressions = expressions.map(|it| format!(r"\A(?:.*\.)?(?:{it})\z"));
        let expressions = RegexSetBuilder::new(expressions)
            .size_limit(PATTERN_BYTES)
            .build()
            .map_err(|error| format!("a pattern of module names cannot be used: {error}"))?;
        Ok(Self {
            patterns,
            expressions,
            indices,
            common,
        })
    }

    fn of(&self, module: &str) -> Option<f64> {
        let named = |(pattern, _): &(String, f64)| is_name(pattern) && names(pattern, module);
        let name = self.patterns.iter().position(named);
        // The matches are in the order of the patterns.
        let expression = self.expressions.matches(module).into_iter().next();
        let first = name
            .into_iter()
            .chain(expression.map(|it| self.indices[it]));
        first.min().map(|at| self.patterns[at].1).or(self.common)
    }
}

/// Whether a pattern has no special characters but dots. Most are such, and there can be hundreds.
fn is_name(pattern: &str) -> bool {
    (pattern.bytes()).all(|it| it.is_ascii_alphanumeric() || it == b'_' || it == b'.')
}

/// Whether a pattern that [`is_name`] matches the end of a module's name. Its dots match anything.
fn names(pattern: &str, module: &str) -> bool {
    let Some(start) = module.len().checked_sub(pattern.len()) else {
        return false;
    };
    let (before, end) = module.as_bytes().split_at(start);
    let mut pairs = pattern.bytes().zip(end);
    matches!(before, [] | [.., b'.']) && pairs.all(|(it, found)| it == b'.' || it == *found)
}

/// A checked configuration of PEFT.
#[derive(Debug)]
pub(super) struct PeftConfig {
    pub(super) place: DeclaredIn,
    ranks: ByModule,
    alphas: ByModule,
    /// Divides alpha by the root of the rank.
    root: bool,
}

impl PeftConfig {
    /// Reads `adapter_config.json`.
    pub(super) fn parse(text: &str) -> Result<Self, LoraFault> {
        Self::new(
            Fields::parse(text, DeclaredIn::PeftConfig)?,
            DeclaredIn::PeftConfig,
        )
    }

    /// Reads `lora_adapter_metadata` of a header; `None` if it does not describe the transformer.
    pub(super) fn parse_metadata(text: &str) -> Result<Option<Self>, LoraFault> {
        let fields = Fields::parse(text, DeclaredIn::HeaderMetadata)?;
        if fields == Fields::default() {
            return Ok(None);
        }
        Self::new(fields, DeclaredIn::HeaderMetadata).map(Some)
    }

    fn new(fields: Fields, place: DeclaredIn) -> Result<Self, LoraFault> {
        fields.check(place)?;
        let invalid = |reason| LoraFault::invalid(place, reason);
        let alpha = match fields.peft_type.as_deref() {
            Some("LOKR" | "LOHA") => fields.alpha,
            _ => fields.lora_alpha,
        };
        Ok(Self {
            place,
            ranks: ByModule::new(fields.rank_pattern, fields.r).map_err(invalid)?,
            alphas: ByModule::new(fields.alpha_pattern, alpha.or(Some(DEFAULT_ALPHA)))
                .map_err(invalid)?,
            root: fields.use_rslora == Some(true),
        })
    }

    /// The rank that a module is declared to have.
    pub(super) fn rank(&self, module: &str) -> Option<f64> {
        self.ranks.of(module)
    }

    /// Alpha and scale of a module. An alpha of 0 is the rank.
    pub(super) fn scale(&self, module: &str, rank: f64) -> (f32, f32) {
        let alpha = self.alphas.of(module).unwrap_or_default();
        let alpha = if alpha == 0.0 { rank } else { alpha };
        let divisor = if self.root { rank.sqrt() } else { rank };
        (alpha as f32, (alpha / divisor) as f32)
    }
}

impl Fields {
    fn parse(text: &str, place: DeclaredIn) -> Result<Self, LoraFault> {
        serde_json::from_str(text).map_err(|it| LoraFault::invalid(place, it))
    }

    /// Refuses what the factors alone do not express.
    fn check(&self, place: DeclaredIn) -> Result<(), LoraFault> {
        let refused = |what: String, refusal| {
            let key = format!("{} in {place}", shown(&what));
            Err(LoraFault::Refused { key, refusal })
        };
        match self.peft_type.as_deref() {
            None | Some("LORA" | "LOKR" | "LOHA") => {}
            Some(other) => return refused(format!("peft_type {other:?}"), Refusal::Unnamed),
        }
        if self.use_dora == Some(true) {
            return refused("use_dora".to_owned(), Refusal::Dora);
        }
        let variants = [
            ("use_qalora", &self.use_qalora),
            ("use_bdlora", &self.use_bdlora),
            ("kasa_config", &self.kasa_config),
            ("monteclora_config", &self.monteclora_config),
        ];
        let is_set = |value: &Value| !matches!(value, Value::Null | Value::Bool(false));
        let mut set = variants
            .iter()
            .filter(|(_, it)| it.as_ref().is_some_and(is_set));
        if let Some((name, _)) = set.next() {
            return refused((*name).to_owned(), Refusal::Unnamed);
        }
        let init = self.init_lora_weights.as_ref().and_then(Value::as_str);
        match init {
            Some(init) if !PLAIN_INITS.contains(&init) => refused(
                format!("init_lora_weights {init:?}"),
                Refusal::Initialisation,
            ),
            _ => Ok(()),
        }
    }
}

/// Reads an alpha that a header has as text.
pub(super) fn parse_alpha(text: &str) -> Result<f64, LoraFault> {
    let alpha = text.trim().parse().ok().filter(|it| is_number(*it));
    let reason = format!("{text:?} is not a number");
    alpha.ok_or_else(|| LoraFault::invalid(DeclaredIn::HeaderAlpha, reason))
}

/// Whether a value is a finite number in f32 too.
fn is_number(value: f64) -> bool {
    (value as f32).is_finite()
}
