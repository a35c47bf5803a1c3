"""Who must supply what the program cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


#: What only people know, asked once per organisation (``aifactory record fill``): key -> (who, question).
PEOPLE: dict[str, tuple[str, str]] = {
    "provider_legal_name": ("provider", "Legal name of the organisation that provides the model"),
    "contact": ("provider", "Contact (e-mail or address)"),
    "authorised_representative": (
        "provider outside the EU",
        "Authorised representative in the Union, or 'none: established in the EU'",
    ),
    "model_name": ("provider", "Name under which the model is or will be published"),
    "release_date": ("provider", "Release date, or 'not released'"),
    "union_market_date": ("provider", "Date of placing on the Union market, or 'not placed on the market'"),
    "distribution_channels": ("provider", "Distribution channels, or 'internal use only'"),
    "licence_of_result": ("provider", "Licence under which the result is given on (SPDX id or name)"),
    "acceptable_use_policy": ("provider", "Link to the acceptable use policy, or 'none'"),
    "intended_use": ("provider", "Intended uses"),
    "restricted_use": ("provider", "Restricted or prohibited uses"),
    "integration": ("provider", "Type and nature of AI systems in which the model may be integrated"),
    "design_rationale": ("provider", "Why this design: rationale and assumptions"),
    "training_rationale": ("provider", "Why this training process: main decisions and their reasons"),
    "unsuitable_data_measures": ("provider", "Measures to detect unsuitable sources (illegal content, personal data)"),
    "bias_measures": ("provider", "Measures to detect identifiable biases"),
    "tdm_statement": ("provider", "Measures to respect reservations of rights (text and data mining)"),
    "illegal_content_measures": ("provider", "Measures to avoid or remove illegal content"),
    "code_signatory": ("provider", "Signatory of the GPAI Code of Practice? (yes/no)"),
    "licensed_data": ("provider", "Commercially licensed data used? (yes/no, modality)"),
    "private_third_party_data": ("provider", "Private data of other third parties? (yes/no, which)"),
    "user_data": ("provider", "Data of users of the model or of other services? (yes/no, description)"),
    "other_data": ("provider", "Other sources of data? (yes/no, description)"),
    "content_types": ("provider", "Types of content in the training data"),
    "regional_characteristics": ("provider", "Regional, demographic or other characteristics of the data"),
    "foreseeable_risks": ("provider", "Foreseeable unintended outcomes and risks"),
    "risk_class": ("provider", "Risk class of the system in which it is used"),
    "signed_by": ("responsible person", "Name and function of the person who signs test reports"),
}
