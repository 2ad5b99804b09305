import Foundation

/// One prompt: states [1,L,D], its weights applied; pooled [1,P] (SDXL); truncated: what did not fit.
public struct Encoded: Sendable {
    public let states: Tensor
    public let pooled: Tensor?
    public let truncated: String
}

/// What the UNet is told besides the latents, by its own input names (edgesd/runtime/text.py).
typealias Conditions = [String: Tensor]

extension Pipeline {
    /// The prompt through every text encoder of the model, their states side by side (SDXL's order), or as prepared.
    public func encodePrompt(_ prompt: String, _ cache: PromptCache) throws -> Encoded {
        if let bank { return try bank.find(prompt) }
        let towers = try tokenizers.map { try tower($0, prompt, cache) }
        return Encoded(
            states: .joined(towers.map(\.states), axis: 2), pooled: towers.compactMap(\.pooled).first,
            truncated: towers.map(\.truncated).first { !$0.isEmpty } ?? "")
    }

    private func tower(_ tokenizer: PromptTokenizer, _ prompt: String, _ cache: PromptCache) throws -> Encoded {
        let tokens = try tokenizer.encode(prompt), component = tokenizer.spec.component
        var made: [[String: Tensor]] = []
        func outputs() throws -> [[String: Tensor]] {
            if made.isEmpty {
                made = try tokens.ids.map { ids in
                    try session.run(component, ["input_ids": .i64(NDArray([1, ids.count], ids.map(Int64.init)))])
                }
            }
            return made
        }
        func output(_ one: [String: Tensor], _ name: String) throws -> Tensor {
            if let found = one[name] { return found }
            throw dataError("\(component) gave no \(name)", "what docs/bundle.md describes", "Package the model again")
        }
        let hidden = try cache.get(PromptCache.key(model: identity, component: component, text: prompt)) {
            .joined(try outputs().map { try output($0, "encoder_hidden_states") }, axis: 1)
        }
        var pooled: Tensor?
        if component == "text_encoder_2" {
            pooled = try cache.get(PromptCache.key(model: identity, component: "\(component)/pooled", text: prompt)) {
                try output(try outputs()[0], "text_embeds")
            }
        }
        guard tokens.weighted else { return Encoded(states: hidden, pooled: pooled, truncated: tokens.truncated) }
        // The weights of each call's tokens on its own states.
        let size = hidden.count / tokens.ids.count, width = hidden.shape[2]
        let parts = tokens.weights.enumerated().map { call, weights in
            applyWeights(Tensor([1, weights.count, width], Array(hidden.values[call * size..<(call + 1) * size])), weights)
        }
        return Encoded(states: .joined(parts, axis: 1), pooled: pooled, truncated: tokens.truncated)
    }

    /// What the UNet is told of the prompt (or the negative prompt), and what of it did not fit.
    func conditions(_ settings: Settings, sizePx: [Int], _ cache: PromptCache, negative: Bool) throws -> (Conditions, String) {
        let encoded = try side(settings, cache, negative)
        var told = ["encoder_hidden_states": encoded.states]
        told["text_embeds"] = encoded.pooled
        if spec.timeIds {
            let ids = timeIds(sizePx, negative: negative)
            told["time_ids"] = Tensor([1, ids.count], ids)
        }
        if spec.guidanceEmbeddingDim > 0 {
            told["timestep_cond"] = guidanceEmbedding(settings.guidanceScale, spec.guidanceEmbeddingDim)
        }
        return (told, encoded.truncated)
    }

    private func side(_ settings: Settings, _ cache: PromptCache, _ negative: Bool) throws -> Encoded {
        guard negative else { return try encodePrompt(settings.prompt, cache) }
        guard spec.zeroEmptyNegative, stripped(settings.negativePrompt).isEmpty else {
            return try encodePrompt(settings.negativePrompt, cache)
        }
        let like = try encodePrompt(settings.prompt, cache)
        return Encoded(states: like.states.scaled(0), pooled: like.pooled?.scaled(0), truncated: "")
    }

    /// SDXL's size conditioning: original size, crop, then target size, or the refiner's aesthetic score.
    private func timeIds(_ sizePx: [Int], negative: Bool) -> [Float] {
        let size = sizePx.map(Float.init)
        return size + [0, 0] + (spec.family == "sdxl_refiner" ? [negative ? 2.5 : 6] : size)
    }
}

/// Sinusoids of guidance - 1 for consistency models, [1,dim].
func guidanceEmbedding(_ guidance: Double, _ dim: Int) -> Tensor {
    let half = dim / 2, step = Float(-log(10000.0) / Double(half - 1))
    let scale = Float((guidance - 1) * 1000)
    let angles: [Float] = (0..<half).map { i in
        let frequency: Double = exp(Double(Float(i) * step))
        return scale * Float(frequency)
    }
    let values: [Float] = angles.map { Float(sin(Double($0))) } + angles.map { Float(cos(Double($0))) }
    return Tensor([1, dim], values + [Float](repeating: 0, count: dim % 2))
}
